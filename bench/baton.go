// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// batonConfig is llm-d's default profile with one more scorer, so that there are four, on the farm's endpoints.
const batonConfig = `apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: file-discovery, name: pool, parameters: {path: ENDPOINTS_FILE}}
- {type: queue-scorer}
- {type: kv-cache-utilization-scorer}
- {type: prefix-cache-scorer}
- {type: active-request-scorer}
- {type: max-score-picker}
dataLayer:
  discovery: {pluginRef: pool}
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
  - {pluginRef: active-request-scorer, weight: 1}
  - {pluginRef: max-score-picker}
`

const (
	endpointsHole = "ENDPOINTS_FILE"
	settleTime    = 1500 * time.Millisecond // after Baton serves: first scrapes of all endpoints
	profileTime   = 10 * time.Second        // at least: a profile has 100 samples a second of CPU
	buildLimit    = 5 * time.Minute
)

// build leaves the binary to measure in s.baton.
func (s *suite) build(ctx context.Context) error {
	if s.opts.Baton != "" {
		path, err := filepath.Abs(s.opts.Baton)
		s.baton = path
		return err
	}
	s.say("building Baton ...")
	ctx, cancel := context.WithTimeout(ctx, buildLimit)
	defer cancel()
	s.baton = filepath.Join(s.dir, "baton")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", s.baton, "github.com/baton-epp/baton/cmd/baton") //nolint:gosec // our own package
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build baton: %w\n%s", err, out)
	}
	return nil
}

// startBaton starts a Baton on the farm's endpoints and returns when it serves.
func (s *suite) startBaton(ctx context.Context, path, label string) (*server, error) {
	config, err := s.config()
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(ctx, 2)
	if err != nil {
		return nil, err
	}
	args := []string{
		"serve", "--config-file", config, "--bind-address", "127.0.0.1", "--secure-serving=false",
		"--grpc-port", strconv.Itoa(ports[0]), "--grpc-health-port", "-1", "--metrics-port", strconv.Itoa(ports[1]),
		"--drain-delay", "0s", "--drain-timeout", "1s",
	}
	if s.opts.CPUProfile != "" {
		args = append(args, "--enable-pprof")
	}
	c, err := s.launcher.start(ctx, true, path, nil, args...)
	if err != nil {
		return nil, err
	}
	baton := &server{child: c, label: label, addr: local(ports[0]), metrics: local(ports[1])}
	if err := baton.serving(ctx); err != nil {
		baton.stop()
		return nil, baton.failure(err)
	}
	wait(ctx, settleTime)
	return baton, nil
}

func local(port int) string { return "127.0.0.1:" + strconv.Itoa(port) }

// config writes the configuration with the place of the endpoints file in it.
func (s *suite) config() (string, error) {
	text := batonConfig
	if s.opts.Config != "" {
		own, err := os.ReadFile(s.opts.Config)
		if err != nil {
			return "", fmt.Errorf("-config: %w", err)
		}
		text = string(own)
	}
	path := filepath.Join(s.dir, "epp.yaml")
	return path, os.WriteFile(path, []byte(strings.ReplaceAll(text, endpointsHole, s.endpointsFile())), 0o600) //nolint:gosec // in our own folder
}

// serving waits until the health service says so.
func (b *server) serving(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	conn, err := grpc.NewClient(b.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := grpc_health_v1.NewHealthClient(conn)
	for {
		answer, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
		if err == nil && answer.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING {
			return nil
		}
		select {
		case <-b.ended:
			return errors.New("ended by itself")
		default:
		}
		if !wait(ctx, 50*time.Millisecond) {
			return fmt.Errorf("not serving within %v: %w", startLimit, errors.Join(err, ctx.Err()))
		}
	}
}

// idle is the CPU that Baton uses without load, in cores.
func (s *suite) idle(ctx context.Context, endpoints int) (float64, error) {
	s.say("idle with %d endpoints for %v ...", endpoints, s.opts.Idle)
	farm, _, err := s.farm(ctx, endpoints)
	if err != nil {
		return 0, err
	}
	defer farm.stop()
	baton, err := s.startBaton(ctx, s.baton, labelBaton)
	if err != nil {
		return 0, err
	}
	defer baton.stop()
	const calm = 3 * time.Second // start-up is not idling
	wait(ctx, calm)
	before, err := cpuOf(baton.pid())
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if !wait(ctx, s.opts.Idle) {
		return 0, context.Cause(ctx)
	}
	after, err := cpuOf(baton.pid())
	return (after - before).Seconds() / time.Since(began).Seconds(), err
}

// profile takes a CPU profile in a round of its own: profiling costs, so that round is not counted.
func (s *suite) profile(ctx context.Context, c benchCase, baton *server) error {
	if err := os.MkdirAll(s.opts.CPUProfile, 0o750); err != nil {
		return err
	}
	path := filepath.Join(s.opts.CPUProfile, strings.NewReplacer("/", ",", "=", "-").Replace(c.Name)+".pprof")
	spec := s.spec(c, baton)
	spec.Duration = max(spec.Duration, profileTime)
	seconds := int((spec.Warmup + spec.Duration) / time.Second)
	fetched := make(chan error, 1)
	go func() {
		url := fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", baton.metrics, seconds)
		fetched <- fetch(ctx, url, path, time.Duration(seconds)*time.Second+startLimit)
	}()
	_, err := s.load(ctx, spec, baton)
	if err = errors.Join(err, <-fetched); err != nil {
		return fmt.Errorf("profile: %w", err)
	}
	s.say("  profile in %s", path)
	return nil
}

// fetch saves what a URL answers.
func fetch(ctx context.Context, url, path string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := new(http.Client).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	const largest = 64 << 20
	body, err := io.ReadAll(io.LimitReader(resp.Body, largest))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", url, resp.Status, body[:min(len(body), 200)])
	}
	return os.WriteFile(path, body, 0o600)
}

var benchmarkLine = regexp.MustCompile(`(?m)^BenchmarkSchedule.*$`)

// benchmarks runs BenchmarkSchedule and returns its lines; what went wrong is said and does not end the comparison.
func (s *suite) benchmarks(ctx context.Context) []string {
	s.say("BenchmarkSchedule ...")
	ctx, cancel := context.WithTimeout(ctx, buildLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkSchedule", "-benchmem", "-benchtime", "1s",
		"github.com/baton-epp/baton/scheduler/...")
	out, err := cmd.CombinedOutput()
	lines := benchmarkLine.FindAllString(string(out), -1)
	if err != nil || len(lines) == 0 {
		s.say("  no benchmark results: %v", err)
	}
	return lines
}
