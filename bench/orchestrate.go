// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// orchestration measures what it costs that Baton issues the prefill itself: the time it adds to the same two HTTP calls
// made by hand, its CPU beside that of a request without prefill, and the memory of requests that are held.
type orchestration struct {
	out        string
	baton      string
	rounds     int
	round      time.Duration
	rate       float64 // requests a second, evenly spaced
	body       int     // bytes of a prompt
	held       int     // requests held at once
	heldBody   int     // bytes of each
	heldFor    time.Duration
	suite      *suite
	prefillers []string
	decoders   []string
}

// orchestrateConfig is a P/D configuration on the engines of baton simulate.
const orchestrateConfig = `apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: file-discovery, name: pool, parameters: {path: ENDPOINTS_FILE}}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
- {type: always-disagg-pd-decider}
- {type: approx-prefix-cache-producer}
- {type: prefill-filter}
- {type: decode-filter}
- {type: prefix-cache-scorer}
- {type: active-request-scorer}
- {type: max-score-picker}
dataLayer: {discovery: {pluginRef: pool}}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: prefix-cache-scorer}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
limits: {maxHeldBytes: 2Gi}
disaggregation: {mode: MODE, prefill: {maxConcurrentPerEndpoint: 2048}}
`

const modeHole = "MODE"

// Targets, shown beside what was measured.
const (
	addedP50Target = 500 * time.Microsecond
	addedP99Target = 3 * time.Millisecond
	cpuRatioTarget = 3.0
	heldTarget     = 600 << 20 // bytes
)

// orchestrateCommand is bench orchestrate.
func orchestrateCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o := &orchestration{}
	fs := flag.NewFlagSet("bench orchestrate", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.out, "out", "", "write a Markdown report to this `file`, such as bench/results/NAME.md")
	fs.StringVar(&o.baton, "baton", "", "Baton's `binary` (default: built from this module)")
	fs.IntVar(&o.rounds, "rounds", 8, "rounds; in each the calls by hand run first, then Baton with prefill, then without")
	fs.DurationVar(&o.round, "duration", 5*time.Second, "length of each part of a round")
	fs.Float64Var(&o.rate, "rate", 100, "requests a second, evenly spaced")
	fs.IntVar(&o.body, "body", 8<<10, "bytes of a prompt")
	fs.IntVar(&o.held, "held", 2000, "requests held at once; 0 leaves that part out")
	fs.IntVar(&o.heldBody, "held-body", 100<<10, "bytes of each of them")
	fs.DurationVar(&o.heldFor, "held-for", 5*time.Second, "how long the prefill endpoints keep them waiting once all are there")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() > 0 || o.rounds < 1 || o.round < 100*time.Millisecond || o.rate <= 0 || o.body < 1 || o.held < 0 || o.heldBody < 1 {
		return errors.New("-rounds, -rate, -body and -held-body must be positive, -duration 100ms or more, and no argument may follow")
	}
	return o.run(ctx, stdout, stderr)
}

func (o *orchestration) run(ctx context.Context, stdout, progress io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "baton-bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	o.suite = &suite{opts: &options{Baton: o.baton}, dir: dir, progress: progress, launcher: launcher{self: self}}
	if err := o.suite.build(ctx); err != nil {
		return err
	}
	engines, err := o.engines(ctx)
	if err != nil {
		return err
	}
	defer engines.stop()
	r := &orchestrated{machine: machineNow(ctx), o: o}
	began := time.Now()
	if err := o.compare(ctx, r); err != nil {
		return err
	}
	if o.held > 0 {
		if err := o.hold(ctx, r); err != nil {
			return err
		}
	}
	r.took = time.Since(began)
	fmt.Fprint(stdout, r.text())
	if o.out == "" {
		return nil
	}
	return os.WriteFile(o.out, []byte(r.text()), 0o600)
}

// engines starts two prefill and two decode endpoints that take no time of their own.
func (o *orchestration) engines(ctx context.Context) (*child, error) {
	ports, err := freePorts(ctx, 1)
	if err != nil {
		return nil, err
	}
	base := ports[0]
	c, err := o.suite.launcher.start(ctx, false, o.suite.baton, nil, "simulate", "--prefill", "2", "--decode", "2",
		"--base-port", strconv.Itoa(base), "--endpoints-file", o.suite.endpointsFile(), "--prefill-fixed", "1ns",
		"--prefill-per-token", "1ns", "--transfer-fixed", "1ns", "--transfer-per-token", "1ns", "--inter-token", "1ns",
		"--handshake", "1ns", "--num-blocks", "200000", "--max-num-seqs", "8192", "--max-model-len", "200000", "--seed", "1")
	if err != nil {
		return nil, err
	}
	o.prefillers, o.decoders = []string{local(base), local(base + 1)}, []string{local(base + 2), local(base + 3)}
	for start := time.Now(); ; {
		resp, err := http.Get("http://" + o.decoders[1] + "/health") //nolint:noctx // on loopback, and bounded by startLimit
		if err == nil {
			_ = resp.Body.Close()
			return c, nil
		}
		if time.Since(start) > startLimit || !wait(ctx, 50*time.Millisecond) {
			c.stop()
			return nil, c.failure(fmt.Errorf("engines do not answer: %w", err))
		}
	}
}

// picker starts a Baton in a mode, with a folder of its own: a shared configuration file would be reloaded by both.
func (o *orchestration) picker(ctx context.Context, mode string) (*server, error) {
	own := *o.suite
	own.dir = filepath.Join(o.suite.dir, mode)
	if err := os.MkdirAll(own.dir, 0o700); err != nil {
		return nil, err
	}
	text := strings.NewReplacer(modeHole, mode, endpointsHole, o.suite.endpointsFile()).Replace(orchestrateConfig)
	own.opts = &options{Config: filepath.Join(own.dir, "source.yaml")}
	if err := os.WriteFile(own.opts.Config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	return own.startBaton(ctx, own.baton, mode)
}
