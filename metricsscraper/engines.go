// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"fmt"
	"strings"
)

// signal is one thing a page may tell about an endpoint.
type signal uint8

const (
	sigWaiting         signal = iota // queue depth, summed
	sigWaitingByReason               // label reason="capacity" only, summed
	sigRunning                       // summed
	sigKVUsage                       // fraction, averaged
	sigKVExpired                     // counter, summed
	sigBlockSize                     // gauge, the largest
	sigNumBlocks                     // gauge, the largest
	sigCacheInfo                     // block size and count in labels
	sigLoRA                          // adapters in labels, the newest series counts
	sigSleep                         // label sleep_state
	signalCount
)

// spec names series: a family and labels that must have given values.
type spec struct {
	family string
	labels []label
}

// engine is one engine's metric names (the engines' sources, mid-2026). A signal may have several
// specs: names of different versions, or series that add up.
type engine struct {
	specs                          [signalCount][]spec
	blockSizeLabel, numBlocksLabel string // of sigCacheInfo
}

// builtinEngines are the engines known without configuration, by the value of the engine label.
func builtinEngines() map[string]engine {
	family := func(names ...string) []spec {
		out := make([]spec, len(names))
		for i, n := range names {
			out[i] = spec{family: n}
		}
		return out
	}
	with := func(name, key, value string) []spec { return []spec{{name, []label{{key, value}}}} }
	return map[string]engine{
		"vllm": {
			specs: [signalCount][]spec{
				sigWaiting:         family("vllm:num_requests_waiting"),
				sigWaitingByReason: with("vllm:num_requests_waiting_by_reason", "reason", "capacity"),
				sigRunning:         family("vllm:num_requests_running"),
				sigKVUsage:         family("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
				sigKVExpired:       family("vllm:nixl_num_kv_expired_reqs_total"),
				sigCacheInfo:       family("vllm:cache_config_info"),
				sigLoRA:            family("vllm:lora_requests_info"),
				sigSleep:           family("vllm:engine_sleep_state"),
			},
			blockSizeLabel: "block_size", numBlocksLabel: "num_gpu_blocks",
		},
		"sglang": {
			specs: [signalCount][]spec{
				// On decode servers the true backlog includes requests that wait for their KV.
				sigWaiting: family("sglang:num_queue_reqs", "sglang:num_decode_prealloc_queue_reqs", "sglang:num_decode_transfer_queue_reqs"),
				sigRunning: family("sglang:num_running_reqs"), sigKVUsage: family("sglang:token_usage"),
				sigCacheInfo: family("sglang:cache_config_info"),
			},
			blockSizeLabel: "page_size", numBlocksLabel: "num_pages",
		},
		"trtllm-serve": {specs: [signalCount][]spec{
			sigWaiting: family("trtllm_num_requests_waiting"), sigRunning: family("trtllm_num_requests_running"),
			sigKVUsage: family("trtllm_kv_cache_utilization"), sigBlockSize: family("trtllm_kv_cache_tokens_per_block"),
			sigNumBlocks: family("trtllm_kv_cache_max_blocks"),
		}},
		"triton-tensorrt-llm": {specs: [signalCount][]spec{
			sigWaiting:   with("nv_trt_llm_request_metrics", "request_type", "waiting"),
			sigRunning:   with("nv_trt_llm_request_metrics", "request_type", "scheduled"),
			sigKVUsage:   with("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "fraction"),
			sigBlockSize: with("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "tokens_per"),
			sigNumBlocks: with("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "max"),
		}},
		"triton": {specs: [signalCount][]spec{
			sigWaiting: family("nv_inference_pending_request_count"), sigRunning: family("nv_inference_exec_count"),
		}},
	}
}

// rule is what a series of a family counts for.
type rule struct {
	signal signal
	labels []label
}

// table is an engine compiled for scanning. Immutable.
type table struct {
	engine
	families map[string][]rule
	lengths  uint64 // bit n: a family has n bytes (63: or more)

	// always is the family without which a filtered page is not believed; names ask for all families without and
	// with cache information.
	always             string
	names, namesCached string
}

func compile(e engine) *table {
	t := &table{engine: e, families: map[string][]rule{}}
	for sig, specs := range e.specs {
		for _, sp := range specs {
			for _, name := range spellings(sp.family) {
				t.families[name] = append(t.families[name], rule{signal: signal(sig), labels: sp.labels})
				t.lengths |= 1 << min(len(name), 63)
			}
		}
	}
	var rest, cached []string
	for sig, specs := range e.specs {
		for _, sp := range specs {
			if signal(sig) == sigCacheInfo {
				cached = append(cached, sp.family)
			} else {
				rest = append(rest, sp.family)
			}
		}
	}
	t.names, t.namesCached = query(rest), query(append(rest, cached...))
	if running := e.specs[sigRunning]; len(running) > 0 {
		t.always = running[0].family
	}
	return t
}

// query is the name filter's query string: name[]=…, each name once.
func query(names []string) string {
	var b strings.Builder
	seen := map[string]bool{}
	for _, n := range names {
		if seen[n] {
			continue
		}
		if seen[n] = true; b.Len() > 0 {
			b.WriteByte('&')
		}
		b.WriteString("name%5B%5D=" + strings.ReplaceAll(n, ":", "%3A"))
	}
	return b.String()
}

// spellings are a name and what relabelling or OpenMetrics makes of its colon.
func spellings(family string) []string {
	if under := strings.Replace(family, ":", "_", 1); under != family {
		return []string{family, under}
	}
	return []string{family}
}

// parseSpec reads llm-d's notation: name, or name{label=value,…} with or without quotes.
func parseSpec(s string) (spec, error) {
	name, rest, braced := strings.Cut(strings.TrimSpace(s), "{")
	sp := spec{family: strings.TrimSpace(name)}
	body, closed := strings.CutSuffix(rest, "}")
	if sp.family == "" || braced != closed || strings.ContainsAny(sp.family, " \t\"=,}&") {
		return spec{}, fmt.Errorf("%q, must be name or name{label=value,…}", s)
	}
	if strings.TrimSpace(body) == "" {
		return sp, nil
	}
	for pair := range strings.SplitSeq(body, ",") {
		key, value, ok := strings.Cut(pair, "=")
		key, value = strings.TrimSpace(key), strings.Trim(strings.TrimSpace(value), `"`)
		if !ok || key == "" {
			return spec{}, fmt.Errorf("%q, must be name or name{label=value,…}", s)
		}
		sp.labels = append(sp.labels, label{key, value})
	}
	return sp, nil
}
