"""The style sheet of report.html: two themes by the reader's own setting, and for paper.

Only CSS. The classes are used by html.py and svg.py.
"""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #586574; --edge: #dfe4ea;
  --track: #eceff3; --accent: #1f6feb; --second: #0f9b8e; --third: #b06ad4; --fourth: #97a3b1;
  --baseline: #8a97a6; --good: #12803c; --good-soft: #e2f4e8; --bad: #c22a22; --bad-soft: #fde9e7;
  --warn: #8f5b00; --warn-soft: #fdf3dc; }
@media (prefers-color-scheme: dark) { :root {
  --page: #10151b; --card: #181f27; --ink: #e7ecf2; --soft: #9aa7b5; --edge: #2c3641;
  --track: #232c36; --accent: #5b9cff; --second: #35c4b5; --third: #c790e8; --fourth: #66727f;
  --baseline: #7f8c9a; --good: #58d083; --good-soft: #173222; --bad: #ff8078;
  --bad-soft: #3a1c1b; --warn: #f0bd55; --warn-soft: #33280f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 27px; line-height: 1.2; margin: 10px 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 20px 0 4px; font-weight: 600; }
p { margin: 0 0 12px; }
.soft, .note { color: var(--soft); } .note { font-size: 13px; max-width: 78ch; }
header { margin-bottom: 22px; }
.verdict { display: inline-block; padding: 3px 12px; border-radius: 999px; font-weight: 650;
  font-size: 13px; letter-spacing: .02em; }
.pass { background: var(--good-soft); color: var(--good); }
.fail { background: var(--bad-soft); color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px;
  margin-bottom: 16px; }
.tile, section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 14px 18px; } section { padding: 20px 22px; margin-bottom: 16px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 31px; font-weight: 680; line-height: 1.25; letter-spacing: -.01em; }
.tile .detail { font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
.tile.bad .value { color: var(--bad); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 4px 36px; }
.columns > * { min-width: 0; }
.scroll { overflow-x: auto; margin: 8px -4px 0; padding: 0 4px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--edge);
  vertical-align: top; }
th { color: var(--soft); font-weight: 550; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; } th:last-child, td:last-child { padding-right: 0; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { font-weight: 550; min-width: 105px; overflow-wrap: break-word; }
td.wide { min-width: 200px; }
.mark { font-weight: 650; white-space: nowrap; } .mark.ok { color: var(--good); }
.mark.no { color: var(--bad); }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--accent); font-size: 14px; }
pre, code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, "Liberation Mono", monospace; }
pre { background: var(--track); padding: 10px 12px; border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 4px 0 12px; }
.warnings { background: var(--warn-soft); border-color: transparent; }
.warnings h2 { color: var(--warn); } .warnings ul { margin: 4px 0 0; padding-left: 20px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft);
  margin: 6px 0; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
dl { display: grid; grid-template-columns: minmax(90px, auto) 1fr; gap: 4px 18px; margin: 0;
  font-size: 13.5px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; overflow: visible; }
svg text { fill: var(--ink); font-size: 13px; }
svg text.tick { fill: var(--soft); font-size: 11px; }
svg text.strong { font-weight: 650; }
.grid { stroke: var(--edge); stroke-width: 1; } rect.track { fill: var(--track); }
rect.unknown { fill: var(--bad-soft); }
.part-linear { fill: var(--accent); background: var(--accent); }
.part-embeddings { fill: var(--second); background: var(--second); }
.part-rest { fill: var(--third); background: var(--third); }
.part-graph { fill: var(--fourth); background: var(--fourth); }
.fill-error { fill: var(--third); } .fill-sparsity { fill: var(--second); }
.fill-kept { fill: var(--accent); } .fill-saved { fill: var(--second); opacity: 0.6; }
.dot-baseline { fill: var(--baseline); fill-opacity: .45; }
.dot-ternary { fill: var(--accent); fill-opacity: .4; }
.box-baseline { fill: var(--baseline); fill-opacity: .22; stroke: var(--baseline); }
.box-ternary { fill: var(--accent); fill-opacity: .2; stroke: var(--accent); }
.median-baseline { stroke: var(--baseline); stroke-width: 2.5; }
.median-ternary { stroke: var(--accent); stroke-width: 2.5; }
.key.baseline { background: var(--baseline); } .key.ternary { background: var(--accent); }
.curve { fill: none; stroke: var(--accent); stroke-width: 2; vector-effect: non-scaling-stroke; }
footer { color: var(--soft); font-size: 12.5px; }
@media (max-width: 560px) { main { padding: 18px 12px 32px; } section { padding: 16px 14px; }
  h1 { font-size: 22px; } .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px 12px; } .tile .value { font-size: 24px; } dl { grid-template-columns: 1fr; }
  dd { margin-bottom: 6px; } td.wide { min-width: 175px; } }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
