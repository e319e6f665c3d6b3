// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"
)

// results are what a comparison found.
type results struct {
	machine    machine
	opts       *options
	took       time.Duration
	rows       []row
	idle       *float64 // cores; nil was not measured
	benchmarks []string // lines of go test -bench
}

// Targets of the issue, beside the ratios in cases.go.
const (
	idleTarget     = "under 0.1"
	scheduleTarget = "endpoints=100 with 4 scorers: under 20 µs and 10 allocations"
)

// table is the comparison as cells, the first line being the head.
func (r *results) table() [][]string {
	out := make([][]string, 0, 1+len(r.rows))
	out = append(out, []string{
		"case", "CPU/request floor", "CPU/request Baton", "ratio (target)",
		"requests/s", "decision p50", "decision p99", "peak RSS",
	})
	for _, c := range r.rows {
		f, b := c.Floor, c.Baton
		out = append(out, []string{
			c.Name, showSpread(spreadOf(f.CPU), "%.1f µs"), showSpread(spreadOf(b.CPU), "%.1f µs"),
			showSpread(spreadOf(ratios(b.CPU, f.CPU)), "%.2f") + fmt.Sprintf(", ≤ %.1f", c.Target),
			showPair(f.Rate, b.Rate, "%.0f"), showPair(f.P50, b.P50, "%.0f µs"), showPair(f.P99, b.P99, "%.0f µs"),
			showBytes(f.Peak) + " / " + showBytes(b.Peak),
		})
	}
	return out
}

// showSpread is the median, with the extremes where there was more than one round.
func showSpread(s spread, format string) string {
	switch {
	case math.IsNaN(s.Median):
		return "–"
	case s.Min == s.Max:
		return fmt.Sprintf(format, s.Median)
	}
	number := strings.TrimSuffix(format, " µs")
	return fmt.Sprintf(format+" ("+number+"–"+number+")", s.Median, s.Min, s.Max)
}

// showPair is the medians of floor and Baton.
func showPair(floor, baton []float64, format string) string {
	one := func(values []float64) string {
		s := spreadOf(values)
		return showSpread(spread{s.Median, s.Median, s.Median}, format)
	}
	return one(floor) + " / " + one(baton)
}

func showBytes(n int64) string {
	if n == 0 {
		return "–"
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// summary is what stands below the table.
func (r *results) summary() []string {
	var out []string
	if r.idle != nil {
		out = append(out, fmt.Sprintf("Idle CPU with 100 endpoints over %v: %.3f cores (target: %s).", r.opts.Idle, *r.idle, idleTarget))
	}
	if len(r.benchmarks) > 0 {
		out = append(out, "BenchmarkSchedule (target at "+scheduleTarget+"):")
		out = append(out, r.benchmarks...)
	}
	return out
}

// print writes the table for a terminal.
func (r *results) print(w io.Writer) error {
	fmt.Fprintf(w, "\n%s\n\n", strings.Join(r.machine.lines(), "\n"))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, cells := range r.table() {
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\n%s\n%s\n", method(r), strings.Join(r.summary(), "\n"))
	return err
}

// method says how the numbers came about.
func method(r *results) string {
	chunks := "each after the echo of the one before"
	if r.opts.Burst {
		chunks = "back to back"
	}
	load := "closed loop, 16 streams at once for 4 KB and 8 for 400 KB"
	if r.opts.Concurrency > 0 {
		load = fmt.Sprintf("closed loop, %d streams at once", r.opts.Concurrency)
	}
	if r.opts.Rate > 0 {
		load = fmt.Sprintf("%g requests a second, evenly spaced", r.opts.Rate)
	}
	if r.opts.Against != "" {
		load = "the floor is not the no-op server but " + r.opts.Against + "; " + load
	}
	return fmt.Sprintf("Pairs are floor / Baton. Median (min–max) of %d rounds of %v after %v of warm-up, floor and Baton in turn; the ratio is taken round by round. "+
		"Load: %s, %d connections, body messages of %d bytes, full-duplex response chunks %s. "+
		"CPU is user and system time of the server process alone, for Baton with scraping, metrics and everything else it does. "+
		"Decision latency: last request message sent to header answer received, by a client on the same machine. Took %v.",
		r.opts.Rounds, r.opts.Duration, r.opts.Warmup, load, r.opts.Connections, r.opts.Piece, chunks, r.took.Round(time.Second))
}

// save writes the report as Markdown.
func (r *results) save(path string) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Baton beside a no-op ext_proc server, %s\n\n", r.machine.Began.Format(time.DateOnly))
	fmt.Fprintf(&b, "Command: `%s`\n\n", strings.Join(append([]string{"go run ./bench"}, r.opts.args...), " "))
	for _, line := range r.machine.lines() {
		fmt.Fprintf(&b, "- %s\n", line)
	}
	b.WriteString("\n")
	for i, cells := range r.table() {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | "))
		if i == 0 {
			b.WriteString(strings.Repeat("|---", len(cells)) + "|\n")
		}
	}
	fmt.Fprintf(&b, "\n%s\n", method(r))
	for i, line := range r.summary() {
		if strings.HasPrefix(line, "Benchmark") && i > 0 && !strings.HasSuffix(line, ":") {
			line = "    " + line
		}
		fmt.Fprintf(&b, "\n%s", line)
	}
	b.WriteString("\n")
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil { //nolint:gosec // the operator's own -out
		return err
	}
	return os.WriteFile(path, b.Bytes(), 0o600) //nolint:gosec // the same
}
