from setuptools import find_packages, setup

setup(
    name="recap_ds",
    version="0.1.0",
    description="RECAP for vision-language-action models: a DeepSpeed ZeRO-3 trainer with critics and exact resume",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["recap_ds", "recap_ds.*"]),
    install_requires=[
        # A wider torch range would pull a release that deepspeed and transformers are not tested with.
        "torch>=2.6,<2.14",
        # 0.19.8: ZeRO-3 skips NaN steps on every rank together, frozen parameters work with checkpointing.
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<6",
        "peft>=0.21.2,<0.22",
        "webdataset>=1.0.2,<2",
        "wandb>=0.19,<1",
        "pyyaml>=6",
        "pydantic>=2.10,<3",
        "safetensors>=0.5,<1",
        "numpy>=1.26,<3",
        "packaging>=23",
        "psutil>=5.9",
        "pyarrow>=17",
        "pillow>=10.1",
        # Decodes JPEGs in half of PIL's time; wheels wherever torch has them.
        "simplejpeg>=1.8,<2",
        "tqdm>=4.66",
    ],
    extras_require={
        # Reading LeRobot data sets: AV1 video.
        "lerobot": ["av>=14"],
        # Simulators, and av for the films of their episodes. MuJoCo draws through EGL or OSMesa: see README.
        "metaworld": ["metaworld>=3,<4", "av>=14"],
        "pusht": ["gym-pusht>=0.1.6,<0.2", "av>=14"],
        # The window in which a person corrects a policy.
        "keyboard": ["pygame>=2.5,<3"],
        # The policy server and its client.
        "serve": ["websockets>=15,<18", "msgpack>=1.0.5,<2"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.15,<0.18",
            "av>=14",
            "websockets>=15,<18",
            "msgpack>=1.0.5,<2",
            "hypothesis>=6.100,<7",
        ],
    },
    entry_points={"console_scripts": ["recap-ds = recap_ds.cli.main:main"]},
)
