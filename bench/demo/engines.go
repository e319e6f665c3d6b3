// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
)

const (
	endpointsFile = "endpoints.yaml" // in the run folder; manifests/demo/epp.yaml names it
	roleLabel     = "llm-d.ai/role"
)

// An engine is one model server.
type engine struct {
	Name string
	Role string
	Addr netip.AddrPort
}

func (e engine) url(path string) string { return "http://" + e.Addr.String() + path }

// endpointList is the file that Baton's file-discovery reads.
type endpointList struct {
	Endpoints []endpointEntry `yaml:"endpoints"`
}

type endpointEntry struct {
	Name    string            `yaml:"name"`
	Address string            `yaml:"address"`
	Port    string            `yaml:"port"`
	Labels  map[string]string `yaml:"labels"`
}

// readEngines reads what the simulated servers, or the demo itself, wrote.
func readEngines(dir string) ([]engine, error) {
	data, err := os.ReadFile(filepath.Join(dir, endpointsFile))
	if err != nil {
		return nil, fmt.Errorf("endpoints: %w", err)
	}
	var list endpointList
	if err := yaml.Unmarshal(data, &list); err != nil {
		return nil, fmt.Errorf("endpoints: %w", err)
	}
	var out []engine
	for _, e := range list.Endpoints {
		addr, err := netip.ParseAddrPort(e.Address + ":" + e.Port)
		if err != nil {
			return nil, fmt.Errorf("endpoint %s: %w", e.Name, err)
		}
		out = append(out, engine{Name: e.Name, Role: e.Labels[roleLabel], Addr: addr})
	}
	if len(out) == 0 {
		return nil, errors.New("endpoints: the file lists none")
	}
	return out, nil
}

func writeEngines(dir string, all []engine) error {
	var list endpointList
	for _, e := range all {
		list.Endpoints = append(list.Endpoints, endpointEntry{
			Name: e.Name, Address: e.Addr.Addr().String(), Port: strconv.Itoa(int(e.Addr.Port())),
			Labels: map[string]string{roleLabel: e.Role, "llm-d.ai/engine-type": "vllm"},
		})
	}
	data, err := yaml.Marshal(list)
	if err != nil {
		return fmt.Errorf("endpoints: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, endpointsFile), data, 0o600); err != nil {
		return fmt.Errorf("endpoints: %w", err)
	}
	return nil
}

// simulated is the command for two prefill and three decode servers.
func simulated(o options) command {
	return command{
		Name: "simulate",
		Path: o.Baton,
		Args: []string{
			"simulate", "--prefill", "2", "--decode", "3", "--base-port", strconv.Itoa(o.port(firstEnginePort)),
			"--endpoints-file", endpointsFile, "--model", o.model(),
			// About the speed of a small model on one GPU, and a cache small enough to see it fill.
			"--prefill-per-token", "100us", "--inter-token", "20ms", "--num-blocks", "2048",
		},
	}
}

// A ledger says what became of the KV blocks of all engines.
type ledger struct {
	Pulls        int // transfers between servers
	PulledTokens int // prompt tokens that came by them
	CachedTokens int // prompt tokens that the servers found in their own prefix caches
	Held         int // uses of KV blocks that are not over
	Leaked       int // finished prefills whose blocks nobody came for
	Wrong        int // transfers that failed, or brought blocks of another prompt
}

// simulatedState is what the demo reads of /admin/state.
type simulatedState struct {
	Running      int `json:"running"`
	Leases       int `json:"leases"`
	Leaked       int `json:"leaked"`
	Pulls        int `json:"pulls"`
	PulledTokens int `json:"pulled_tokens"`
	FailedPulls  int `json:"failed_pulls"`
	WrongPulls   int `json:"wrong_pulls"`
	PrefixHits   int `json:"prefix_cache_hits"` // tokens
}

// simulatedLedger asks every simulated server.
func simulatedLedger(ctx context.Context, h *http.Client, all []engine) (ledger, error) {
	var sum ledger
	for _, e := range all {
		var s simulatedState
		if err := getJSON(ctx, h, e.url("/admin/state"), &s); err != nil {
			return sum, err
		}
		sum.Pulls += s.Pulls
		sum.PulledTokens += s.PulledTokens
		sum.CachedTokens += s.PrefixHits
		sum.Held += s.Running + s.Leases
		sum.Leaked += s.Leaked
		sum.Wrong += s.FailedPulls + s.WrongPulls
	}
	return sum, nil
}

// The metrics in which vLLM says the same.
const (
	metricPulled  = `vllm:prompt_tokens_by_source_total{`
	sourceRemote  = `source="external_kv_transfer"`
	metricPulls   = `vllm:nixl_xfer_time_seconds_count`
	metricHits    = `vllm:prefix_cache_hits_total`
	metricFailed  = `vllm:nixl_num_failed_transfers_total`
	metricExpired = `vllm:nixl_num_kv_expired_reqs_total`
	metricUsage   = `vllm:kv_cache_usage_perc`
)

// vllmLedger reads every server's metrics. A cache that is in use while no request runs is held by a prefill.
func vllmLedger(ctx context.Context, h *http.Client, all []engine) (ledger, error) {
	var sum ledger
	for _, e := range all {
		resp, err := get(ctx, h, e.url("/metrics"), "text/plain")
		if err != nil {
			return sum, err
		}
		sc := bufio.NewScanner(resp.Body)
		for sc.Scan() {
			sum.add(sc.Text())
		}
		resp.Body.Close()
		if err := sc.Err(); err != nil {
			return sum, fmt.Errorf("metrics of %s: %w", e.Name, err)
		}
	}
	return sum, nil
}

// add counts one line of a metrics page.
func (l *ledger) add(line string) {
	i := strings.LastIndexByte(line, ' ')
	if i < 0 || strings.HasPrefix(line, "#") {
		return
	}
	value, err := strconv.ParseFloat(line[i+1:], 64)
	if err != nil || value == 0 {
		return
	}
	switch {
	case strings.HasPrefix(line, metricPulled) && strings.Contains(line, sourceRemote):
		l.PulledTokens += int(value)
	case strings.HasPrefix(line, metricPulls):
		l.Pulls += int(value)
	case strings.HasPrefix(line, metricHits):
		l.CachedTokens += int(value)
	case strings.HasPrefix(line, metricFailed):
		l.Wrong += int(value)
	case strings.HasPrefix(line, metricExpired):
		l.Leaked += int(value)
	case strings.HasPrefix(line, metricUsage):
		l.Held++
	}
}
