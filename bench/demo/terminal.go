// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const (
	redrawEvery = 250 * time.Millisecond
	totalsEvery = 5 * time.Second
	enterScreen = "\x1b[?1049h\x1b[?25l" // the alternate screen, without a cursor
	leaveScreen = "\x1b[?25h\x1b[?1049l"
)

// terminalSize reports the size of the terminal that f is; ok is false when it is none.
func terminalSize(f *os.File) (columns, lines int, ok bool) {
	var size struct{ Lines, Columns, X, Y uint16 }
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size))) //nolint:gosec // the ioctl fills in size
	return int(size.Columns), int(size.Lines), errno == 0 && os.Getenv("TERM") != "dumb"
}

// asciiOnly reports whether the locale names another character set than UTF-8.
func asciiOnly() bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := os.Getenv(name); v != "" {
			v = strings.ToUpper(v)
			return !strings.Contains(v, "UTF-8") && !strings.Contains(v, "UTF8")
		}
	}
	return true
}

// show draws t until ctx ends: in place on a terminal, as lines elsewhere.
func show(ctx context.Context, out *os.File, f frame, t *tally) {
	if _, _, ok := terminalSize(out); !ok {
		showLines(ctx, out, t)
		return
	}
	fmt.Fprint(out, enterScreen)
	defer fmt.Fprint(out, leaveScreen)
	f.ASCII = asciiOnly()
	for {
		f.Width, f.Height, _ = terminalSize(out)
		fmt.Fprint(out, "\x1b[H"+strings.Join(f.lines(t.snapshot()), "\x1b[K\n")+"\x1b[J")
		if !wait(ctx, redrawEvery) {
			return
		}
	}
}

// showLines prints a line for each answered request, and the totals every few seconds.
func showLines(ctx context.Context, out io.Writer, t *tally) {
	p := printer{out: out, seen: map[string]bool{}}
	last := time.Now()
	for more := true; more; {
		more = wait(ctx, redrawEvery)
		s := t.snapshot()
		p.rows(s.Rows, !more)
		if more && time.Since(last) >= totalsEvery {
			last = time.Now()
			n := s.Totals
			fmt.Fprintf(out, "%5s  %d sent, %d answered, %d failed, %s disaggregated, first token: median %s\n", clock(s.Elapsed),
				n.Sent, n.Answered, n.Failed, percent(n.Disaggregated, n.Answered), milliseconds(s.Median))
		}
	}
}

// A printer prints each request once.
type printer struct {
	out  io.Writer
	seen map[string]bool // true once printed, false while only the decision is missing
}

// rows prints what is complete, and with final also what will never be.
func (p *printer) rows(rows []row, final bool) {
	for _, r := range rows {
		printed, awaited := p.seen[r.ID]
		if printed || r.Result.ID == "" {
			continue
		}
		if r.Decision.RequestID == "" && !awaited && !final {
			p.seen[r.ID] = false // the decision is on its way: one more round
			continue
		}
		p.seen[r.ID] = true
		fmt.Fprintln(p.out, line(r))
	}
}

// line tells one request in a line.
func line(r row) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  ", r.ID)
	if d := r.Decision; d.RequestID != "" {
		who := shortName(d.Picks[phaseDecode])
		if p := d.prefiller(); p != "" {
			who = shortName(p) + " -> " + who
		}
		fmt.Fprintf(&b, "%6s tokens  %-22s  ", number(d.PromptTokens), who)
	}
	if r.Result.Stopped {
		return b.String() + "stopped"
	}
	if r.Result.Err != nil {
		return b.String() + "FAILED: " + clip(r.Result.Err.Error(), 300)
	}
	if r.Result.ID != "" {
		fmt.Fprintf(&b, "first token %7s  ", milliseconds(r.Result.FirstToken))
	}
	return strings.TrimRight(b.String()+r.Decision.why(), " ")
}
