"""The page's look: light and dark, phone, desktop and paper. Colours of curves are classes c0 to c7.

Eight colours that also people who confuse red and green can tell apart, each with a contrast of at least 4.5 to 1
against its background; on paper, where they may be grey, lines are dashed as well.
"""

LIGHT = {
    "page": "#f6f6f3", "card": "#ffffff", "ink": "#1b1c1e", "soft": "#55585e", "edge": "#d8d8d2", "grid": "#e6e6e1",
    "good": "#17693a", "warn": "#8a5200", "bad": "#b3261e", "note": "#44536b", "link": "#0b57a4",
    "c0": "#0b62b5", "c1": "#b84a00", "c2": "#00785a", "c3": "#8b3fb5",
    "c4": "#a8326f", "c5": "#5b6b00", "c6": "#00727f", "c7": "#5c5c66",
}  # fmt: skip
DARK = {
    "page": "#131417", "card": "#1d1f23", "ink": "#ececec", "soft": "#aeb2ba", "edge": "#3a3d44", "grid": "#2d3036",
    "good": "#6fd295", "warn": "#f2b558", "bad": "#ff8f85", "note": "#a9bbd6", "link": "#8cc2ff",
    "c0": "#6db3ff", "c1": "#ff9a57", "c2": "#4fd1a5", "c3": "#cf9bf5",
    "c4": "#ff8fbf", "c5": "#c3d153", "c6": "#5cd0de", "c7": "#b9bcc6",
}  # fmt: skip
DASHES = ("none", "7 3", "2 2", "9 3 2 3", "4 2", "1 3", "12 4", "6 2 1 2 1 2")

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:1220px;margin:0 auto;padding:0 16px}
header{padding-top:20px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:36px 0 12px;padding-top:8px;border-top:1px solid var(--edge)}
h3{font-size:1rem;margin:20px 0 8px;overflow-wrap:anywhere}
p{margin:6px 0;max-width:75ch;overflow-wrap:anywhere}
a{color:var(--link)}
code,pre{font:0.86em/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}
pre{margin:0;padding:10px;overflow-x:auto;background:var(--page);border:1px solid var(--edge);border-radius:6px}
small,.note,.soft,footer{color:var(--soft);font-size:0.86rem}
nav ul{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:10px 0;padding:0;font-size:0.92rem}
nav a{display:inline-block;padding:3px 0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px}
.card,.chart{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px;margin:0;min-width:0}
.card{margin-bottom:14px}
.card h3{margin-top:0}
.verdict{font-size:1.12rem;font-weight:650;margin:2px 0}
.chip{font-weight:700}
.progress{height:8px;border-radius:4px;background:var(--grid);margin:8px 0;overflow:hidden}
.progress div{height:100%;background:var(--c0)}
.findings{list-style:none;margin:8px 0;padding:0;max-width:90ch}
.findings li{padding:4px 0 4px 4.4em;position:relative;overflow-wrap:anywhere}
.findings b{position:absolute;left:0}
.mend{display:block;color:var(--soft);font-size:0.92rem}
.good{color:var(--good)}.warn{color:var(--warn)}.bad{color:var(--bad)}.note-level{color:var(--note)}
.next{margin:6px 0 2px;padding:0;list-style:none}
.next li{margin:4px 0}
figcaption{font-weight:600;font-size:0.94rem;margin-bottom:4px;overflow-wrap:anywhere}
figcaption .note{font-weight:400}
.chart svg,.card svg{display:block;width:100%;height:auto}
.empty{color:var(--soft)}
svg text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--soft)}
svg .figure,svg .heading{fill:var(--ink)}
svg .heading{font-weight:700}
svg g>text:not(.figure){fill:var(--ink)}
svg tspan.note{fill:var(--soft);font-size:11px}
.grid path.grid,svg path.grid{stroke:var(--grid);fill:none}
svg path.axis,svg path.tick{stroke:var(--soft);fill:none}
svg path.line{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
svg path.band{fill:var(--c);opacity:0.2;stroke:none}
svg circle{fill:var(--c)}
svg .bar{fill:var(--c);opacity:0.85}
svg g .bar{opacity:0.3}
svg .whisker{stroke:var(--c);stroke-width:2;fill:none}
svg .seed{fill:none;stroke:var(--c)}
svg path.reference{stroke:var(--soft);stroke-dasharray:4 4;fill:none}
svg path.mark{stroke:var(--bad);stroke-width:2;fill:none}
.legend{list-style:none;margin:4px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:0.84rem}
.legend li{overflow-wrap:anywhere;min-width:0}
.legend svg{display:inline-block;width:22px;height:8px;margin-right:5px;vertical-align:middle}
.scroll{overflow-x:auto;margin:8px 0;background:
linear-gradient(to right,var(--page) 40%,transparent) left/40px 100% no-repeat local,
linear-gradient(to left,var(--page) 40%,transparent) right/40px 100% no-repeat local,
linear-gradient(to right,var(--edge),transparent) left/14px 100% no-repeat scroll,
linear-gradient(to left,var(--edge),transparent) right/14px 100% no-repeat scroll}
.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:collapse;font-size:0.88rem;min-width:min(100%,420px)}
caption{text-align:left;font-weight:600;padding:4px 0}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--edge);vertical-align:top}
th{font-weight:600;color:var(--soft)}
tbody th{color:var(--ink);font-weight:500;min-width:min(15em,34vw);overflow-wrap:anywhere}
thead th{vertical-align:bottom}
td.figure,th.figure{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.text{min-width:7em;max-width:34em;overflow-wrap:anywhere}
.best{font-weight:700}
details{margin:8px 0}
summary{cursor:pointer;font-weight:600;padding:4px 0}
video{width:100%;height:auto;border-radius:6px;background:#000}
footer{padding:24px 16px 40px}
@media (max-width:480px){body{font-size:15px}main,header,footer{padding-left:12px;padding-right:12px}
.card,.chart{padding:10px}.findings li{padding-left:0}.findings b{position:static;margin-right:6px}}
@media print{html{font-size:12px}body{background:#fff;font-size:12px}
nav{display:none}.card,.chart{break-inside:avoid;border-color:#bbb}
h2,h3{break-after:avoid}.grid{grid-template-columns:repeat(2,1fr)}.scroll{overflow:visible;background:none}
details::details-content{content-visibility:visible;display:block;block-size:auto}
a{color:inherit;text-decoration:none}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
"""


def style_sheet() -> str:
    light, dark = _variables(LIGHT), _variables(DARK)
    classes = "".join(f".c{number}{{--c:var(--c{number})}}" for number in range(len(DASHES)))
    dashes = "".join(
        f"svg path.line.c{number},svg .c{number} path.line{{stroke-dasharray:{dash}}}"
        for number, dash in enumerate(DASHES)
    )
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        f"{classes}{_RULES}{dashes}}}"  # the last of the rules is open: those of paper
    )


def _variables(colors: dict[str, str]) -> str:
    return "".join(f"--{name}:{color};" for name, color in colors.items())
