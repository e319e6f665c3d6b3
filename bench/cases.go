// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// benchCase is one kind of traffic on a pool of one size.
type benchCase struct {
	Name        string
	PromptBytes int
	Chunks      int // of the response
	FullDuplex  bool
	Endpoints   int
	Concurrency int
	Target      float64 // CPU per request of Baton over the floor's, at most
}

// cases are those of the issue: short and long, both response modes, small and large pool.
func cases(o *options) []benchCase {
	var out []benchCase
	for _, traffic := range []benchCase{
		{Name: "prompt=4KB/chunks=8", PromptBytes: 4 << 10, Chunks: 8, Concurrency: 16, Target: 2.0},
		{Name: "prompt=400KB/chunks=200", PromptBytes: 400 << 10, Chunks: 200, Concurrency: 8, Target: 1.5},
	} {
		for _, mode := range []string{"quiet", "full-duplex"} {
			for _, endpoints := range []int{10, 100} {
				c := traffic
				c.Name = fmt.Sprintf("%s/mode=%s/endpoints=%d", c.Name, mode, endpoints)
				c.FullDuplex, c.Endpoints = mode != "quiet", endpoints
				if o.Concurrency > 0 {
					c.Concurrency = o.Concurrency
				}
				if o.wants(&c) {
					out = append(out, c)
				}
			}
		}
	}
	return out
}

// wants reports whether the case is to be run; a quick run takes a small and a large one on the small pool.
func (o *options) wants(c *benchCase) bool {
	if o.Quick && (c.Endpoints == 100 || !c.FullDuplex && c.Chunks == 200) {
		return false
	}
	return o.Case.MatchString(c.Name)
}

// measured is what one server did in the rounds of one case.
type measured struct {
	CPU, Rate, P50, P99 []float64 // µs per request, requests a second, µs, µs
	Peak                int64     // bytes resident, at most
}

func (m *measured) add(r *loadResult) {
	n := float64(max(r.Requests, 1))
	m.CPU = append(m.CPU, micros(r.CPU)/n)
	m.Rate = append(m.Rate, float64(r.Requests)/r.Elapsed.Seconds())
	m.P50, m.P99 = append(m.P50, micros(r.P50)), append(m.P99, micros(r.P99))
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// row is the result of one case.
type row struct {
	benchCase
	Floor, Baton measured
}

// suite runs the comparison. It belongs to one goroutine, whose thread must live as long as the program.
type suite struct {
	opts     *options
	launcher launcher
	dir      string    // scratch, removed at the end
	progress io.Writer // one line per step
	baton    string    // binary; empty measures the floor alone
}

// compare runs everything the options ask for, prints the table and writes the report.
func compare(ctx context.Context, o *options, stdout, progress io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "baton-bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	s := &suite{opts: o, dir: dir, progress: progress, launcher: launcher{self: self, pin: o.Pin, env: []string{childVariable + "=1"}}}
	began := time.Now()
	results, err := s.run(ctx)
	if err != nil {
		return err
	}
	results.took = time.Since(began)
	if err := results.print(stdout); err != nil {
		return err
	}
	if o.Out == "" {
		return nil
	}
	return results.save(o.Out)
}

// childVariable tells the bench's own test binary that it runs as a part of the comparison.
const childVariable = "BATON_BENCH_PART"

func (s *suite) run(ctx context.Context) (*results, error) {
	out := &results{machine: machineNow(ctx), opts: s.opts}
	if !s.opts.FloorOnly {
		if err := s.build(ctx); err != nil {
			return nil, err
		}
	}
	for _, c := range cases(s.opts) {
		r, err := s.measure(ctx, c)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.Name, err)
		}
		out.rows = append(out.rows, *r)
	}
	if s.baton != "" && s.opts.Idle > 0 {
		cores, err := s.idle(ctx, 100)
		if err != nil {
			return nil, fmt.Errorf("idle: %w", err)
		}
		out.idle = &cores
	}
	if s.baton != "" && s.opts.Benchmarks {
		out.benchmarks = s.benchmarks(ctx)
	}
	return out, nil
}

func (s *suite) say(format string, args ...any) { fmt.Fprintf(s.progress, format+"\n", args...) }

// measure runs one case: a farm, both servers on it, and the rounds, floor and Baton in turn.
func (s *suite) measure(ctx context.Context, c benchCase) (*row, error) {
	s.say("%s", c.Name)
	farm, addrs, err := s.farm(ctx, c.Endpoints)
	if err != nil {
		return nil, err
	}
	defer farm.stop()
	floor, err := s.startBase(ctx, addrs)
	if err != nil {
		return nil, err
	}
	defer floor.stop()
	var baton *server
	if s.baton != "" {
		if baton, err = s.startBaton(ctx, s.baton, labelBaton); err != nil {
			return nil, err
		}
		defer baton.stop()
	}
	r := &row{benchCase: c}
	for i := range s.opts.Rounds {
		if err := s.round(ctx, c, i, floor, &r.Floor); err != nil {
			return nil, err
		}
		if baton == nil {
			continue
		}
		if err := s.round(ctx, c, i, baton, &r.Baton); err != nil {
			return nil, err
		}
	}
	if baton != nil && s.opts.CPUProfile != "" {
		return r, s.profile(ctx, c, baton)
	}
	return r, nil
}

// round puts one round of load on a server.
func (s *suite) round(ctx context.Context, c benchCase, i int, on *server, into *measured) error {
	result, err := s.load(ctx, s.spec(c, on), on)
	if err != nil {
		return err
	}
	into.add(result)
	into.Peak = max(into.Peak, peakOf(on.pid()))
	n := len(into.CPU) - 1
	s.say("  round %d/%d  %-5s  %7.1f µs CPU/request  %8.0f requests/s  decision p50 %.0f µs, p99 %.0f µs",
		i+1, s.opts.Rounds, on.label, into.CPU[n], into.Rate[n], into.P50[n], into.P99[n])
	return nil
}

// spec is one round of a case.
func (s *suite) spec(c benchCase, on *server) loadSpec {
	return loadSpec{
		Target: on.addr, PID: on.pid(), PromptBytes: c.PromptBytes, Chunks: c.Chunks, FullDuplex: c.FullDuplex,
		Burst: s.opts.Burst, Piece: s.opts.Piece, Concurrency: c.Concurrency, Connections: s.opts.Connections,
		Rate: s.opts.Rate, Warmup: s.opts.Warmup, Duration: s.opts.Duration,
	}
}

// load runs the client in a process of its own.
func (s *suite) load(ctx context.Context, spec loadSpec, on *server) (*loadResult, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	client, err := s.launcher.part(ctx, false, partLoad, "-spec", string(text))
	if err != nil {
		return nil, err
	}
	defer client.stop()
	var result loadResult
	limit := spec.Warmup + spec.Duration + longestWait + settleAfter + startLimit
	if err := client.read(ctx, limit, &result); err != nil {
		return nil, err
	}
	if result.Error != "" {
		err := fmt.Errorf("%s: %d requests failed, the first: %s", on.label, max(result.Errors, 1), result.Error)
		return nil, errors.Join(err, errors.New(on.said.String()))
	}
	return &result, nil
}

// farm starts the endpoints; their file is s.endpointsFile().
func (s *suite) farm(ctx context.Context, n int) (*child, []string, error) {
	farm, err := s.launcher.part(ctx, false, partFarm, "-endpoints", strconv.Itoa(n), "-file", s.endpointsFile())
	if err != nil {
		return nil, nil, err
	}
	var said farmed
	if err := farm.read(ctx, startLimit, &said); err != nil {
		farm.stop()
		return nil, nil, err
	}
	return farm, said.Addrs, nil
}

func (s *suite) endpointsFile() string { return filepath.Join(s.dir, "endpoints.yaml") }

// server is a child that answers ext_proc.
type server struct {
	*child
	label   string
	addr    string // of its ext_proc port
	metrics string // of its metrics port; Baton only
}

const (
	labelFloor = "floor"
	labelBaton = "Baton"
)

// startBase starts what Baton is compared with.
func (s *suite) startBase(ctx context.Context, endpoints []string) (*server, error) {
	if s.opts.Against != "" {
		path, err := filepath.Abs(s.opts.Against)
		if err != nil {
			return nil, err
		}
		return s.startBaton(ctx, path, labelFloor)
	}
	floor, err := s.launcher.part(ctx, true, partFloor, "-endpoints", strings.Join(endpoints, ","))
	if err != nil {
		return nil, err
	}
	var said listening
	if err := floor.read(ctx, startLimit, &said); err != nil {
		floor.stop()
		return nil, err
	}
	return &server{child: floor, label: labelFloor, addr: said.Addr}, nil
}
