// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// options are what scripts/demo.sh and the environment set.
type options struct {
	Baton, Envoy string // binaries
	Config       string // for baton serve
	Trace        string
	Dir          string // run folder: endpoints file, Envoy's configuration, logs
	VLLM         string // folder with a vLLM environment and model; "" runs simulated servers
	PortBase     int
	For          time.Duration // 0: the whole trace once, then until Ctrl-C
}

const (
	defaultPortBase = 18000
	portSpan        = 300 // ports from the first one that the demo may use
)

func parseOptions(args []string, env func(string) string) (options, error) {
	o := options{PortBase: defaultPortBase}
	f := flag.NewFlagSet("demo", flag.ContinueOnError)
	f.StringVar(&o.Baton, "baton", "bin/baton", "the baton `binary`")
	f.StringVar(&o.Envoy, "envoy", "", "the Envoy `binary`")
	f.StringVar(&o.Config, "config-file", "manifests/demo/epp.yaml", "configuration `file` of baton serve")
	f.StringVar(&o.Trace, "trace", "bench/testdata/mooncake-sample.jsonl", "`file` with the requests to send")
	f.StringVar(&o.Dir, "run-dir", ".cache/demo", "`folder` for logs and generated files")
	f.StringVar(&o.VLLM, "vllm", "", "`folder` with a vLLM environment (venv) and a model: run two real servers instead of simulated ones")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if o.Envoy == "" {
		return o, errors.New("-envoy names no binary: start the demo with make demo")
	}
	if err := o.environment(env); err != nil {
		return o, err
	}
	// The processes run in the run folder, so what they are told must not depend on the present one.
	for _, path := range []*string{&o.Baton, &o.Envoy, &o.Config, &o.Dir, &o.VLLM} {
		if *path == "" {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return o, fmt.Errorf("%s: %w", *path, err)
		}
		*path = abs
	}
	o.Dir = filepath.Join(o.Dir, strconv.Itoa(o.PortBase)) // one per demo that runs at the same time
	if err := os.MkdirAll(o.Dir, 0o750); err != nil {
		return o, fmt.Errorf("run folder: %w", err)
	}
	return o, nil
}

func (o *options) environment(env func(string) string) error {
	if v := env("DEMO_PORT_BASE"); v != "" {
		base, err := strconv.Atoi(v)
		if err != nil || base < 1024 || base > 65535-portSpan {
			return fmt.Errorf("DEMO_PORT_BASE=%s: must be a number from 1024 to %d", v, 65535-portSpan)
		}
		o.PortBase = base
	}
	if v := env("DEMO_SECONDS"); v != "" {
		seconds, err := strconv.ParseFloat(v, 64)
		if err != nil || seconds <= 0 || seconds > 86400 {
			return fmt.Errorf("DEMO_SECONDS=%s: must be a number of seconds above 0", v)
		}
		o.For = time.Duration(seconds * float64(time.Second))
	}
	return nil
}

func (o *options) port(offset int) int { return o.PortBase + offset }

// model is the name under which the model servers serve.
func (o *options) model() string {
	if o.VLLM != "" {
		return "tiny"
	}
	return "demo"
}

// pace is how the trace is sent.
func (o *options) pace() pace {
	if o.VLLM != "" {
		// Two servers on a CPU: about a request a second. The tiny model's tokenizer makes a token of 2.4 bytes of
		// these texts, so prompts stay below 4,096 tokens.
		return pace{Divisor: 8, Speed: 0.3, MaxPromptBytes: 9200}
	}
	return pace{Divisor: 8, Speed: 1.5}
}
