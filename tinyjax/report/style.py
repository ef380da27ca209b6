"""How the page looks: one style sheet, light and dark, from a phone to a desk, on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --card: #ffffff; --ink: #1c1f24; --soft: #5c6370; --line: #e3e5e8; --stripe: #f6f7f8;
  --holds: #0f7a4d; --fails: #b42318; --undecided: #8a5a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c; --card: #1a1a1a; --ink: #e6e7ea; --soft: #9aa1ac; --line: #31353c; --stripe: #1e2126;
    --holds: #4ec98f; --fails: #ff8a7a; --undecided: #e5b455;
  }
  /* The plots are drawn on white: inverted to the card's colour, then turned back to their own hues. */
  .plot img { filter: invert(.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 50rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { margin: 0 0 .6rem; font-size: clamp(1.6rem, 5vw, 2.1rem); line-height: 1.2; letter-spacing: -.015em; text-wrap: balance; }
h2 { margin: 0 0 .6rem; font-size: 1.1rem; line-height: 1.35; letter-spacing: -.005em; text-wrap: balance; }
p { margin: 0 0 .6rem; }
section { margin-top: 2.75rem; }
.question { font-size: 1.15rem; line-height: 1.5; text-wrap: pretty; }
.source, .note, figcaption { color: var(--soft); font-size: .9rem; line-height: 1.5; }
figure { margin: 0; }
figcaption { margin-top: .6rem; }
.holds { --tone: var(--holds); } .fails { --tone: var(--fails); } .undecided { --tone: var(--undecided); }
.badge {
  display: inline-block; padding: .05em .65em; border-radius: 1em; border: 1px solid; white-space: nowrap;
  color: var(--tone); border-color: color-mix(in srgb, var(--tone) 40%, transparent);
  background: color-mix(in srgb, var(--tone) 10%, transparent); font-weight: 600; font-size: .85rem;
}
.overall { display: flex; flex-wrap: wrap; align-items: baseline; gap: .35rem .75rem; margin-bottom: 1rem; }
.overall .badge { font-size: 1rem; }
.claims { margin: 0; padding: 0; list-style: none; }
.claims li { padding: .8rem 0 .8rem 1rem; border-left: 3px solid var(--tone); margin-top: .75rem; }
.claims p { margin: 0; }
.claims .sentence { font-weight: 600; }
.claims .badge { margin-right: .35rem; }
.evidence { font-variant-numeric: tabular-nums; }
.scroll { overflow: auto; border: 1px solid var(--line); border-radius: 8px; background: var(--card); }
.scroll:focus-visible { outline: 2px solid var(--soft); outline-offset: 2px; }
.plot .scroll { padding: .5rem; }
.plot img { display: block; width: 100%; min-width: 25rem; height: auto; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; line-height: 1.45; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .45rem .85rem; text-align: left; vertical-align: baseline; overflow-wrap: normal; white-space: pre-line; }
thead th { border-bottom: 1px solid var(--line); color: var(--soft); font-weight: 600; font-size: .85rem; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--stripe); }
.number { text-align: right; }
td.number { white-space: nowrap; }
td.text { overflow-wrap: break-word; }
td.wordy { min-width: 24ch; }
.provenance { overflow-wrap: anywhere; }
.provenance th { width: 11rem; color: var(--soft); font-weight: 500; white-space: nowrap; }
pre { margin: 0; padding: .85rem 1rem; font: .85rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; tab-size: 4; }
.long { max-height: 34rem; }
.prose { white-space: pre-wrap; }
@media (max-width: 34rem) {
  body { padding-top: 1.75rem; }
  th, td { padding: .4rem .6rem; }
  .provenance th { width: auto; }
}
@media print {
  body { max-width: none; padding: 0; }
  .scroll { overflow: visible; max-height: none; border: 0; }
  figure, .claims li { break-inside: avoid; }
  pre { white-space: pre-wrap; }
}
"""
