// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/baton-epp/baton/internal/alloctest"
	"github.com/baton-epp/baton/pool"
)

func pages(tb testing.TB) map[string][]byte {
	tb.Helper()
	names, err := filepath.Glob("testdata/*.prom")
	if err != nil || len(names) < 10 {
		tb.Fatalf("pages: %v %v", names, err)
	}
	out := map[string][]byte{}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			tb.Fatal(err)
		}
		out[filepath.Base(name)] = data
	}
	return out
}

// read scans a page as vLLM's and extracts it.
func read(engine, page string) *pool.Metrics {
	var r reading
	var x extractor
	m := &pool.Metrics{}
	DefaultEngines().tables[engine].scan([]byte(page), &r)
	x.extract(&r, m, &pool.Metrics{}, true)
	return m
}

// oracle computes the summed signals with prometheus/common. ok is false when it refuses the page.
func oracle(t *table, page []byte) (sums map[signal]float64, ok bool) {
	// The oracle panics on braces without a name before or in them; such a page counts as refused.
	defer func() {
		if recover() != nil {
			sums, ok = nil, false
		}
	}()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(page))
	if err != nil {
		return nil, false
	}
	sums = map[signal]float64{}
	for name, rules := range t.families {
		f := families[name]
		for _, rule := range rules {
			for _, m := range f.GetMetric() {
				value, plain := scalar(m)
				if !plain {
					return nil, false
				}
				if matches(m, rule.labels) && value >= 0 && !math.IsInf(value, 0) {
					sums[rule.signal] += value
				}
			}
		}
	}
	return sums, true
}

func scalar(m *dto.Metric) (float64, bool) {
	switch {
	case m.GetGauge() != nil:
		return m.GetGauge().GetValue(), true
	case m.GetCounter() != nil:
		return m.GetCounter().GetValue(), true
	case m.GetUntyped() != nil:
		return m.GetUntyped().GetValue(), true
	default:
		return 0, false // a histogram or summary of that name
	}
}

func matches(m *dto.Metric, want []label) bool {
	for _, w := range want {
		got := ""
		for _, l := range m.GetLabel() {
			if l.GetName() == w.name {
				got = l.GetValue()
			}
		}
		if got != w.value {
			return false
		}
	}
	return true
}

// compared are the signals that are plain sums.
func compared() []signal { return []signal{sigWaiting, sigWaitingByReason, sigRunning, sigKVExpired} }

func TestScanAgreesWithExpfmt(t *testing.T) {
	for name, data := range pages(t) {
		for _, newline := range []string{"\n", "\r\n"} {
			t.Run(fmt.Sprintf("%s/%q", name, newline), func(t *testing.T) {
				tb := DefaultEngines().tables["vllm"]
				text := data
				if i := bytes.Index(text, []byte("# EOF")); i >= 0 {
					text = text[:i] // expfmt's text parser does not know it
				}
				want, ok := oracle(tb, text)
				if !ok {
					t.Fatal("the oracle refuses the page")
				}
				var r reading
				tb.scan(bytes.ReplaceAll(data, []byte("\n"), []byte(newline)), &r)
				for _, sig := range append(compared(), sigKVUsage) {
					if r.sum[sig] != want[sig] {
						t.Errorf("signal %d = %v, want %v", sig, r.sum[sig], want[sig])
					}
				}
			})
		}
	}
}

func TestRealPages(t *testing.T) {
	data := pages(t)
	has := pool.HasWaiting | pool.HasRunning | pool.HasKVCacheUsage | pool.HasCacheConfig | pool.HasSleep | pool.HasWaitingByReason
	tests := map[string]pool.Metrics{
		"vllm_idle.prom":            {Has: has, BlockSize: 32, NumBlocks: 160},
		"vllm_load.prom":            {Has: has, Waiting: 8, WaitingCapacity: 8, Running: 2, KVCacheUsage: 0.5031446540880503, BlockSize: 32, NumBlocks: 160},
		"vllm_openmetrics.prom":     {Has: has, BlockSize: 32, NumBlocks: 160},
		"vllm_name_filter.prom":     {Has: pool.HasWaiting},
		"vllm_prefill_expired.prom": {Has: has | pool.HasKVExpired, KVExpired: 5, BlockSize: 32, NumBlocks: 400},
		"vllm_prefill_pinned.prom":  {Has: has | pool.HasKVExpired, KVCacheUsage: 0.01754385964912286, BlockSize: 32, NumBlocks: 400},
		"vllm_lora_load.prom": {
			Has: has | pool.HasLoRA, Waiting: 3, Running: 3, KVCacheUsage: 0.28301886792452835, BlockSize: 32, NumBlocks: 160,
			MaxLoRA: 1, RunningLoRA: []string{"sql"}, WaitingLoRA: []string{"sql"},
		},
		"vllm_lora_after.prom": {Has: has | pool.HasLoRA, BlockSize: 32, NumBlocks: 160, MaxLoRA: 1}, // the empty series is the newest
	}
	for name, want := range tests {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(&want, read("vllm", string(data[name]))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestScanQuirks(t *testing.T) {
	tests := []struct {
		name, engine, page string
		want               pool.Metrics
	}{
		{"empty", "vllm", "", pool.Metrics{}},
		{"no newline at the end", "vllm", "vllm:num_requests_running 3", pool.Metrics{Has: pool.HasRunning, Running: 3}},
		{"created is no value", "vllm", "vllm:nixl_num_kv_expired_reqs_created 1.7e9\nvllm:num_requests_running_created 5\n", pool.Metrics{}},
		{"NaN is unknown", "vllm", "vllm:num_requests_running NaN\nvllm:num_requests_waiting +Inf\nvllm:kv_cache_usage_perc -Inf\n", pool.Metrics{}},
		{"NaN beside a value", "vllm", "vllm:kv_cache_usage_perc{engine=\"0\"} NaN\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.5\n", pool.Metrics{Has: pool.HasKVCacheUsage, KVCacheUsage: 0.5}},
		{"negative is unknown", "vllm", "vllm:num_requests_running -1\n", pool.Metrics{}},
		{"engines", "vllm", "vllm:num_requests_running{engine=\"0\"} 1\nvllm:num_requests_running{engine=\"1\"} 2\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.2\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.6\n", pool.Metrics{Has: pool.HasRunning | pool.HasKVCacheUsage, Running: 3, KVCacheUsage: 0.4}},
		{"old name", "vllm", "vllm:gpu_cache_usage_perc 0.25\n", pool.Metrics{Has: pool.HasKVCacheUsage, KVCacheUsage: 0.25}},
		{"a percentage", "vllm", "vllm:gpu_cache_usage_perc 25\n", pool.Metrics{}},
		{"underscores", "vllm", "vllm_num_requests_waiting{a=\"b\"} 4\n", pool.Metrics{Has: pool.HasWaiting, Waiting: 4}},
		{"blanks", "vllm", " \tvllm:num_requests_waiting \t{ a = \"b\" , c=\"d\", } \t4 1700000000\n", pool.Metrics{Has: pool.HasWaiting, Waiting: 4}},
		{"exemplar", "vllm", "vllm:num_requests_waiting 4 # {trace=\"x\"} 1.0\n# EOF\n", pool.Metrics{Has: pool.HasWaiting, Waiting: 4}},
		{"brace and quote in a value", "vllm", "vllm:num_requests_waiting{model_name=\"a} \\\"9\\\\\"} 4\n", pool.Metrics{Has: pool.HasWaiting, Waiting: 4}},
		{"bad lines", "vllm", "vllm:num_requests_waiting\nvllm:num_requests_waiting{a=\"b} 1\nvllm:num_requests_waiting{a} 1\nvllm:num_requests_waiting 0x1p4\nvllm:num_requests_waiting 1_0\nvllm:num_requests_waiting{a=\"b\"c=\"d\"} 5\nvllm:num_requests_waiting 7\n", pool.Metrics{Has: pool.HasWaiting, Waiting: 7}},
		{"carriage returns", "vllm", "vllm:num_requests_waiting 4\r\n\r\nvllm:num_requests_running{a=\"b\"} 5\r\n", pool.Metrics{Has: pool.HasWaiting | pool.HasRunning, Waiting: 4, Running: 5}},
		{"asleep", "vllm", "vllm:engine_sleep_state{sleep_state=\"awake\"} 0\nvllm:engine_sleep_state{sleep_state=\"weights_offloaded\"} 1\n", pool.Metrics{Has: pool.HasSleep, Sleeping: true}},
		{"half asleep", "vllm", "vllm:engine_sleep_state{engine=\"0\",sleep_state=\"awake\"} 1\nvllm:engine_sleep_state{engine=\"1\",sleep_state=\"discard_all\"} 1\n", pool.Metrics{Has: pool.HasSleep}},
		{"nothing loaded any more", "vllm", "vllm:lora_requests_info{max_lora=\"2\",running_lora_adapters=\"a, b\",waiting_lora_adapters=\"c\"} 10\nvllm:lora_requests_info{max_lora=\"2\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} 11\n", pool.Metrics{Has: pool.HasLoRA, MaxLoRA: 2}},
		{"the newest adapters", "vllm", "vllm:lora_requests_info{max_lora=\"2\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} 9\nvllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a, b\\\"\",waiting_lora_adapters=\"c\"} 10\n", pool.Metrics{Has: pool.HasLoRA, MaxLoRA: 4, RunningLoRA: []string{"a", "b\""}, WaitingLoRA: []string{"c"}}},
		{"cache of several engines", "vllm", "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"100\"} 1\nvllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"200\"} 1\n", pool.Metrics{Has: pool.HasCacheConfig, BlockSize: 16, NumBlocks: 200}},
		{"cache unknown", "vllm", "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"None\"} 1\n", pool.Metrics{Has: pool.HasCacheConfig, BlockSize: 16}},
		{"sglang", "sglang", "sglang:num_queue_reqs 1\nsglang:num_decode_prealloc_queue_reqs 2\nsglang:num_running_reqs 3\nsglang:token_usage 0.5\nsglang:cache_config_info{page_size=\"64\",num_pages=\"10\"} 1\n", pool.Metrics{Has: pool.HasWaiting | pool.HasRunning | pool.HasKVCacheUsage | pool.HasCacheConfig, Waiting: 3, Running: 3, KVCacheUsage: 0.5, BlockSize: 64, NumBlocks: 10}},
		{"trtllm-serve", "trtllm-serve", "trtllm_num_requests_waiting 1\ntrtllm_num_requests_running 3\ntrtllm_kv_cache_utilization 0.5\ntrtllm_kv_cache_tokens_per_block 32\ntrtllm_kv_cache_max_blocks 99\n", pool.Metrics{Has: pool.HasWaiting | pool.HasRunning | pool.HasKVCacheUsage | pool.HasCacheConfig, Waiting: 1, Running: 3, KVCacheUsage: 0.5, BlockSize: 32, NumBlocks: 99}},
		{"triton", "triton-tensorrt-llm", "nv_trt_llm_request_metrics{model=\"m\",request_type=\"waiting\"} 1\nnv_trt_llm_request_metrics{request_type=\"scheduled\"} 2\nnv_trt_llm_request_metrics{request_type=\"max\"} 99\nnv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\"} 0.1\nnv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"tokens_per\"} 64\n", pool.Metrics{Has: pool.HasWaiting | pool.HasRunning | pool.HasKVCacheUsage | pool.HasCacheConfig, Waiting: 1, Running: 2, KVCacheUsage: 0.1, BlockSize: 64}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(&tt.want, read(tt.engine, tt.page)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoRAListsAreKept(t *testing.T) {
	var r reading
	var x extractor
	tb := DefaultEngines().tables["vllm"]
	page := pages(t)["vllm_lora_load.prom"]
	tb.scan(page, &r)
	first, second := &pool.Metrics{}, &pool.Metrics{}
	x.extract(&r, first, &pool.Metrics{}, true)
	tb.scan(page, &r)
	x.extract(&r, second, first, true)
	if &first.RunningLoRA[0] != &second.RunningLoRA[0] {
		t.Error("the same list was split again")
	}
}

func TestScanAllocations(t *testing.T) {
	for name, data := range pages(t) {
		var r reading
		tb := DefaultEngines().tables["vllm"]
		tb.scan(data, &r)
		alloctest.AtMost(t, 0, name, func() { tb.scan(data, &r) })
	}
}

func FuzzScan(f *testing.F) {
	nameless := regexp.MustCompile(`(?m)^[ \t]*\{|\{[ \t]*"`)
	for _, data := range pages(f) {
		var wanted [][]byte
		for line := range bytes.Lines(data) {
			if len(wanted) < 40 && (bytes.HasPrefix(line, []byte("vllm")) || bytes.HasPrefix(line, []byte("# TYPE"))) {
				wanted = append(wanted, line)
			}
		}
		f.Add(bytes.Join(wanted, nil))
	}
	f.Add([]byte("vllm:num_requests_running{a=\"\\\\\\n\\\"\"} 1e3 5\nvllm_num_requests_waiting\t{reason=\"capacity\" ,} NaN\n"))
	tb := DefaultEngines().tables["vllm"]
	f.Fuzz(func(t *testing.T, data []byte) {
		var r reading
		var x extractor
		tb.scan(data, &r)
		x.extract(&r, &pool.Metrics{}, &pool.Metrics{}, false)
		// Names in quotes inside the braces are newer than the engines' pages and not read. The oracle takes a carriage
		// return for a part of the value, and braces without any name for the series before.
		want, ok := oracle(tb, data)
		if !ok || bytes.ContainsRune(data, '\r') || nameless.Match(data) {
			return
		}
		for _, sig := range compared() {
			if math.Abs(r.sum[sig]-want[sig]) > 1e-9*math.Abs(want[sig]) {
				t.Errorf("signal %d = %v, want %v", sig, r.sum[sig], want[sig])
			}
		}
	})
}

func BenchmarkScan(b *testing.B) {
	data := pages(b)
	tb := DefaultEngines().tables["vllm"]
	for _, bm := range []struct{ name, page string }{
		{"page=whole", string(data["vllm_idle.prom"])},
		{"page=filtered", filtered(string(data["vllm_idle.prom"]), tb)},
	} {
		b.Run(bm.name, func(b *testing.B) {
			page := []byte(bm.page)
			var r reading
			b.SetBytes(int64(len(page)))
			b.ReportAllocs()
			for b.Loop() {
				tb.scan(page, &r)
			}
		})
	}
}

// filtered is what a server that knows the name filter would send.
func filtered(page string, tb *table) string {
	var out strings.Builder
	for line := range strings.Lines(page) {
		name, _ := cutName([]byte(strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")))
		if tb.families[string(name)] != nil {
			out.WriteString(line)
		}
	}
	return out.String()
}
