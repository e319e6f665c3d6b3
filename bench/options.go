// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"regexp"
	"time"
)

// options are what the command line sets.
type options struct {
	Quick      bool
	FloorOnly  bool
	Out        string // Markdown report; empty writes none
	Baton      string // binary to measure; empty builds one
	Against    string // another Baton to take the floor's place; empty is the floor
	Config     string // EndpointPickerConfig; empty takes the bench's own, see batonConfig
	CPUProfile string // folder for Baton's CPU profiles
	Case       *regexp.Regexp
	Rounds     int
	Warmup     time.Duration // of each round
	Duration   time.Duration // measured part of each round
	Idle       time.Duration // how long Baton is watched without load; 0 leaves it out
	Benchmarks bool          // run BenchmarkSchedule as well
	Pin        bool          // servers on the first core, everything else on the others

	Concurrency int     // streams open at once; 0 is 16 for the small prompts and 8 for the large ones
	Rate        float64 // requests a second, evenly spaced; 0 sends the next as soon as a stream is free
	Connections int
	Piece       int  // bytes of a body message
	Burst       bool // response chunks without waiting for the echo of the one before

	args []string // as given, for the report
}

func parseOptions(args []string, stderr io.Writer) (*options, error) {
	o := &options{args: args}
	filter := ""
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.BoolVar(&o.Quick, "quick", false, "one short round of one small and one large case: does it work at all")
	fs.BoolVar(&o.FloorOnly, "floor-only", false, "measure the floor alone")
	fs.StringVar(&o.Out, "out", "", "write a Markdown report to this `file`, such as bench/results/NAME.md")
	fs.StringVar(&o.Baton, "baton", "", "Baton's `binary` (default: built from this module)")
	fs.StringVar(&o.Against, "against", "", "another Baton's `binary` in place of the floor: the ratio then says what a change did")
	fs.StringVar(&o.Config, "config", "", "EndpointPickerConfig `file`; ENDPOINTS_FILE in it is replaced (default: llm-d's default profile and one more scorer)")
	fs.StringVar(&o.CPUProfile, "cpuprofile", "", "`folder` for CPU profiles of Baton, one per case, taken under load in a round of its own")
	fs.StringVar(&filter, "case", "", "run only the cases whose name matches this `regexp`, such as 'prompt=4KB.*endpoints=100'")
	fs.IntVar(&o.Rounds, "rounds", 8, "rounds per case; in each the floor runs first, then Baton")
	fs.DurationVar(&o.Warmup, "warmup", 300*time.Millisecond, "load before the measured part of a round")
	fs.DurationVar(&o.Duration, "duration", time.Second, "measured part of a round")
	fs.DurationVar(&o.Idle, "idle", 20*time.Second, "watch Baton without load for this long (0: not)")
	fs.BoolVar(&o.Benchmarks, "schedule", true, "run BenchmarkSchedule for the report")
	fs.BoolVar(&o.Pin, "pin", false, "servers on core 0, load and endpoints on the other cores (needs taskset)")
	fs.IntVar(&o.Concurrency, "concurrency", 0, "streams open at once (default 16 for 4 KB, 8 for 400 KB)")
	fs.Float64Var(&o.Rate, "rate", 0, "requests a second, evenly spaced; 0: as fast as -concurrency allows")
	fs.IntVar(&o.Connections, "connections", 2, "HTTP/2 connections, as many as an Envoy has workers")
	fs.IntVar(&o.Piece, "piece", 16<<10, "largest body message in bytes: Envoy sends 16384 over HTTP/2, up to 1048576 over HTTP/1.1")
	fs.BoolVar(&o.Burst, "burst", false, "full-duplex response chunks back to back, not each after the echo of the one before")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if o.Quick {
		o.Rounds, o.Warmup, o.Duration, o.Benchmarks = 1, 200*time.Millisecond, 500*time.Millisecond, false
		o.Idle = min(o.Idle, 2*time.Second)
	}
	re, err := regexp.Compile(filter)
	o.Case = re
	if err != nil {
		err = fmt.Errorf("-case: %w", err)
	}
	return o, errors.Join(err, o.validate(fs.NArg()))
}

func (o *options) validate(extra int) error {
	var errs []error
	if extra > 0 {
		errs = append(errs, errors.New("unexpected arguments after the flags"))
	}
	if o.Rounds < 1 || o.Connections < 1 || o.Concurrency < 0 || o.Rate < 0 {
		errs = append(errs, errors.New("-rounds and -connections must be at least 1, -concurrency and -rate not negative"))
	}
	if o.Duration < 100*time.Millisecond || o.Duration > time.Minute || o.Warmup < 0 || o.Warmup > time.Minute || o.Idle < 0 {
		errs = append(errs, errors.New("-duration must be 100ms to 1m, -warmup 0 to 1m, -idle not negative"))
	}
	if o.Piece < 1<<10 || o.Piece > 1<<20 {
		errs = append(errs, errors.New("-piece must be 1024 to 1048576"))
	}
	if o.FloorOnly && (o.CPUProfile != "" || o.Against != "") {
		errs = append(errs, errors.New("-floor-only goes with neither -cpuprofile nor -against"))
	}
	return errors.Join(errs...)
}
