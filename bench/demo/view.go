// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// A frame is what the terminal shows at one moment.
type frame struct {
	Title  string   // of the whole
	Try    []string // lines of a command to try by hand, at most 79 columns each
	Width  int      // columns, 80 at least
	Height int      // lines, 24 at least
	ASCII  bool     // the terminal shows nothing else
}

const (
	minWidth   = 80
	minHeight  = 24
	bold, dim  = "\x1b[1m", "\x1b[2m"
	red, plain = "\x1b[31m", "\x1b[0m"
)

// lines renders s into at most Height lines of at most Width columns; style codes do not count as columns.
func (f frame) lines(s snapshot) []string {
	f.Width, f.Height = max(f.Width, minWidth), max(f.Height, minHeight)
	head := f.head(s)
	foot := f.foot(s)
	room := f.Height - len(head) - len(foot) - 1 // the last line stays empty, so that nothing scrolls
	return append(append(head, f.requests(s, room)...), foot...)
}

func (f frame) head(s snapshot) []string {
	out := []string{
		f.styled(bold, f.sides(f.Title, clock(s.Elapsed))),
		"",
		f.styled(dim, f.endpointLine("ENDPOINT", "ROLE", "STATE", "QUEUE", "RUNNING", f.pad("KV CACHE", f.bar()+5), "IN FLIGHT", "PREFIX HITS")),
	}
	for _, e := range s.Endpoints {
		h := s.Hits[e.Endpoint]
		share := "-"
		if h.Picked > 0 {
			share = fmt.Sprintf("%d of %d", h.Hit, h.Picked)
		}
		line := f.endpointLine(shortName(e.Endpoint), e.Role, e.state(), number(int(e.Queue)), number(int(e.Running)),
			f.meter(e.KVCache), number(e.InFlight), share)
		if e.state() != "ready" {
			line = f.styled(red, line)
		}
		out = append(out, line)
	}
	if len(s.Endpoints) == 0 {
		out = append(out, "  (waiting for Baton to tell)")
	}
	return append(out, "")
}

func (f frame) endpointLine(name, role, state, queue, running, kv, inFlight, prefix string) string {
	return f.cut(fmt.Sprintf("%-10s %-8s %-9s %5s %7s  %s %9s  %s", clip(name, 10), clip(role, 8), clip(state, 9), queue, running, kv, inFlight, prefix))
}

// bar is the width of the KV cache bar: what the terminal has beyond the narrowest line.
func (f frame) bar() int { return min(30, 7+f.Width-minWidth) }

func (f frame) meter(fraction float64) string {
	fraction = min(max(fraction, 0), 1)
	full := int(fraction*float64(f.bar()) + 0.5)
	on, off := "█", "░"
	if f.ASCII {
		on, off = "#", "."
	}
	return strings.Repeat(on, full) + strings.Repeat(off, f.bar()-full) + fmt.Sprintf("%4.0f%%", fraction*100)
}

func (f frame) requests(s snapshot, room int) []string {
	out := []string{f.styled(dim, f.requestLine("REQUEST", "TOKENS", "PREFILL ON", "DECODE ON", "1ST TOKEN", "WHY"))}
	for _, r := range slices.Backward(s.Rows[max(0, len(s.Rows)-room+1):]) {
		out = append(out, f.request(r))
	}
	for len(out) < room {
		out = append(out, "")
	}
	return out
}

func (f frame) request(r row) string {
	tokens, prefill, decode, first, why := "", "", "", "", ""
	if d := r.Decision; d.RequestID != "" {
		tokens, decode, why = number(d.PromptTokens), shortName(d.Picks[phaseDecode]), d.why()
		prefill = "-"
		if p := d.prefiller(); p != "" {
			prefill = shortName(p)
		}
	}
	if r.Result.Stopped {
		return f.requestLine(r.ID, tokens, prefill, decode, "stopped", why)
	}
	if r.Result.Err != nil {
		return f.styled(red, f.requestLine(r.ID, tokens, prefill, decode, "failed", r.Result.Err.Error()))
	}
	if r.Result.FirstToken > 0 {
		first = milliseconds(r.Result.FirstToken)
	}
	if r.Decision.RequestID == "" && r.Result.ID == "" {
		why = "running"
	}
	return f.requestLine(r.ID, tokens, prefill, decode, first, why)
}

func (f frame) requestLine(id, tokens, prefill, decode, first, why string) string {
	return f.cut(fmt.Sprintf("%-10s %6s  %-10s %-9s %9s  %s", clip(id, 10), tokens, clip(prefill, 10), clip(decode, 9), first, why))
}

func (f frame) foot(s snapshot) []string {
	t := s.Totals
	counts := f.cut(fmt.Sprintf("%d sent   %d answered   %d failed   %s disaggregated   %s of prompts cached",
		t.Sent, t.Answered, t.Failed, percent(t.Disaggregated, t.Answered), percent(t.MatchedBlocks, t.PromptBlocks)))
	if t.Failed > 0 {
		counts = f.styled(red, counts)
	}
	first := fmt.Sprintf("first token: median %s, 95%% below %s", milliseconds(s.Median), milliseconds(s.P95))
	out := []string{"", counts, f.sides(first, "Ctrl-C ends")}
	if len(f.Try) > 0 {
		out = append(out, f.styled(dim, "By hand, in another terminal:"))
		for _, l := range f.Try {
			out = append(out, f.cut(l))
		}
	}
	return out
}

// sides puts two texts at both ends of a line.
func (f frame) sides(left, right string) string {
	gap := f.Width - width(left) - width(right)
	if gap < 1 {
		return f.cut(left)
	}
	return left + strings.Repeat(" ", gap) + right
}

func (f frame) cut(s string) string { return strings.TrimRight(clip(s, f.Width), " ") }

func (f frame) pad(s string, n int) string { return fmt.Sprintf("%-*s", n, s) }

func (f frame) styled(style, s string) string { return style + s + plain }

// clip shortens s to n columns. A newline ends it: what servers say must not break the picture.
func clip(s string, n int) string {
	s, _, _ = strings.Cut(s, "\n")
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	return string([]rune(s)[:n])
}

// width counts columns, without style codes.
func width(s string) int {
	for _, style := range []string{bold, dim, red, plain} {
		s = strings.ReplaceAll(s, style, "")
	}
	return utf8.RuneCountInString(s)
}

func clock(d time.Duration) string {
	return fmt.Sprintf("%d:%02d", int(d.Minutes()), int(d.Seconds())%60)
}

func milliseconds(d time.Duration) string {
	return number(int(d.Milliseconds())) + " ms"
}

// number groups thousands.
func number(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func percent(part, whole int) string {
	if whole == 0 {
		return "0%"
	}
	return fmt.Sprintf("%d%%", 100*part/whole)
}
