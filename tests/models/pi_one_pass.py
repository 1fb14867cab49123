"""pi0 / pi0.5 as they were published: both towers in lock-step, one dense softmax per layer over prefix and suffix.

Written from the papers on the weights of our modules: the independent computation that the two-pass form is checked
against. One draw per sample. B batch   T prefix tokens   S suffix tokens   H chunk
"""

import math

import torch
from torch.nn import functional


def one_pass_velocity(paligemma, expert, observation, pixels, x_t, time, extra=None, words=()):
    """Velocity [B, H, A] for x_t [B, H, A], time [B]; ``extra`` [B, D] is added to the time's features.

    ``words``: token ids between prefix and suffix, a block of their own.
    """
    prefix, prefix_mask = _prefix(paligemma, observation, pixels)
    prefix = torch.cat([prefix, _embedded(paligemma, torch.tensor([words] * len(prefix), dtype=torch.long))], dim=1)
    prefix_mask = torch.cat([prefix_mask, torch.ones(len(prefix), len(words), dtype=torch.bool)], dim=1)
    suffix, condition = _suffix(expert, observation.state, x_t, time, 0.0 if extra is None else extra)
    num_prefix, num_suffix, chunk = prefix.shape[1], suffix.shape[1], x_t.shape[1]
    # openpi's rule: a token sees those whose block number is not above its own.
    blocks = [0] * (num_prefix - len(words)) + [1] * len(words) + ([2] if num_suffix > chunk else []) + [3] * chunk
    block = torch.tensor(blocks)
    real = torch.cat([prefix_mask, torch.ones(len(prefix), num_suffix, dtype=torch.bool)], dim=1)
    mask = (block[None, :] <= block[:, None])[None] & real[:, None, :]
    position = real.long().cumsum(dim=1) - 1
    x = [prefix, suffix]
    layers = zip(paligemma.language_model.layers, expert.layers, strict=True)
    for left, right in layers:
        x = _joint_layer(left, right, x, condition, position, mask)
    out, _ = _normed(expert.norm, x[1][:, -chunk:], condition)
    return expert.action_out_proj(out)


def _prefix(paligemma, observation, pixels):
    images = [
        paligemma.multi_modal_projector(paligemma.vision_tower(pixels[:, camera]).last_hidden_state)
        for camera in range(pixels.shape[1])
    ]
    words = _embedded(paligemma, observation.tokens)
    masks = [observation.camera_mask[:, c : c + 1].expand(-1, image.shape[1]) for c, image in enumerate(images)]
    return torch.cat([*images, words], dim=1), torch.cat([*masks, observation.token_mask], dim=1)


def _embedded(paligemma, tokens):
    table = paligemma.language_model.embed_tokens.weight
    return functional.embedding(tokens, table) * math.sqrt(table.shape[1])


def _suffix(expert, state, x_t, time, extra):
    width = expert.dims.width
    period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
    angle = 2 * math.pi * time.double()[:, None] / period
    features = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    tokens = expert.action_in_proj(x_t)
    silu = functional.silu
    if expert.dims.version == "pi05":
        return tokens, silu(expert.time_mlp_out(silu(expert.time_mlp_in(features)))) + extra
    features = (features + extra)[:, None].expand_as(tokens)
    tokens = expert.action_time_mlp_out(silu(expert.action_time_mlp_in(torch.cat([tokens, features], dim=2))))
    return torch.cat([expert.state_proj(state)[:, None], tokens], dim=1), None


def _normed(norm, x, condition):
    unit = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    if condition is None:
        return unit * (1 + norm.weight), 1.0
    scale, shift, gate = norm.dense(condition)[:, None].chunk(3, dim=-1)
    return unit * (1 + scale) + shift, gate


def _joint_layer(left, right, x, condition, position, mask):
    towers = ((left, x[0], None), (right, x[1], condition))
    normed = [_normed(layer.input_layernorm, part, wanted) for layer, part, wanted in towers]
    head_dim = right.self_attn.head_dim

    def project(name):
        parts = [
            layer.self_attn.get_submodule(name)(part).unflatten(-1, (-1, head_dim))
            for (layer, _, _), (part, _) in zip(towers, normed, strict=True)
        ]
        return torch.cat(parts, dim=1).transpose(1, 2)

    query, key, value = _rope(project("q_proj"), position), _rope(project("k_proj"), position), project("v_proj")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) / math.sqrt(head_dim)).masked_fill(~mask[:, None], -torch.inf)
    attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    out, start = [], 0
    for (layer, part, wanted), (_, gate) in zip(towers, normed, strict=True):
        end = start + part.shape[1]
        part = part + gate * layer.self_attn.o_proj(attended[:, start:end])
        middle, gate = _normed(layer.post_attention_layernorm, part, wanted)
        mlp = layer.mlp
        hidden = functional.gelu(mlp.gate_proj(middle), approximate="tanh") * mlp.up_proj(middle)
        out.append(part + gate * mlp.down_proj(hidden))
        start = end
    return out


def _rope(x, position):
    half = x.shape[-1] // 2
    angle = position[:, None, :, None] / 10_000.0 ** (torch.arange(half) / half)
    turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], dim=-1).contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle))
    return torch.cat([turned[..., 0], turned[..., 1]], dim=-1)
