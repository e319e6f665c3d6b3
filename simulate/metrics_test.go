// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"sort"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/baton-epp/baton/internal/alloctest"
)

func TestMetricSlotsAreInThePage(t *testing.T) {
	v := reflect.ValueOf(*metricSlots())
	zero := 0
	for i := range v.NumField() {
		f, name := v.Field(i), v.Type().Field(i).Name
		switch f.Kind() {
		case reflect.Int:
			if f.Int() == 0 {
				zero++
				t.Errorf("slot %s is not in the page", name)
			}
		case reflect.Pointer:
			if h := f.Elem(); f.IsNil() || h.FieldByName("bounds").Len() == 0 || h.FieldByName("count").Int() == 0 {
				t.Errorf("histogram %s is not in the page", name)
			}
		default:
			t.Errorf("field %s", name)
		}
	}
}

// families parses a page with Prometheus' own parser.
func families(t *testing.T, page []byte) map[string]string {
	t.Helper()
	p := expfmt.NewTextParser(model.UTF8Validation)
	got, err := p.TextToMetricFamilies(bytes.NewReader(page))
	if err != nil {
		t.Fatalf("page: %v", err)
	}
	out := map[string]string{}
	for name, f := range got {
		out[name] = f.GetType().String()
	}
	return out
}

func TestPageIsTheRealOne(t *testing.T) {
	p, d := newPair(t, Options{Model: `ti"ny`, BlockSize: 16, NumBlocks: 400})
	h := prefillLeg(t, p, "[1,2,3,4,5]", `,"model":"ti\"ny"`)
	post(t, d, "/v1/completions", `{"prompt":[1,2,3,4,5],"max_tokens":5`+withHandle(h)+`}`)
	page := get(t, d, "/metrics").body
	if n := len(page); n < 48_000 || n > 75_000 {
		t.Errorf("page of %d bytes", n)
	}
	got, want := families(t, page), families(t, []byte(capturedPage))
	if !reflect.DeepEqual(got, want) {
		t.Errorf("families\n got %v\nwant %v", got, want)
	}
	for _, line := range []string{
		`vllm:prompt_tokens_by_source_total{engine="0",model_name="ti\"ny",source="external_kv_transfer"} 5.0`,
		`vllm:request_generation_tokens_bucket{engine="0",le="5.0",model_name="ti\"ny"} 1.0`,
		`vllm:request_generation_tokens_bucket{engine="0",le="2.0",model_name="ti\"ny"} 0.0`,
		`vllm:nixl_bytes_transferred_count{engine="0",model_name="ti\"ny"} 1.0`,
		`vllm:engine_sleep_state{engine="0",model_name="ti\"ny",sleep_state="awake"} 1.0`,
		`vllm:inter_token_latency_seconds_count{engine="0",model_name="ti\"ny"} 4.0`,
	} {
		if !bytes.Contains(page, []byte(line+"\n")) {
			t.Errorf("no line %s", line)
		}
	}
	if !bytes.Contains(page, []byte(`,block_size="16",`)) || !bytes.Contains(page, []byte(`num_gpu_blocks="400"`)) || !bytes.Contains(page, []byte(`kv_cache_size_tokens="6400"`)) {
		t.Error("cache_config_info is not the engine's")
	}
}

// TestPageOfTheCapturedServer renders the page that was captured, but for times and what an HTTP server counts.
func TestPageOfTheCapturedServer(t *testing.T) {
	e := newEngine(t, Options{BlockSize: 32, NumBlocks: 400})
	strip := func(page string) []string {
		var out []string
		for line := range strings.Lines(page) {
			if !strings.HasPrefix(line, "#") {
				_, line, _ = splitSample(strings.TrimSuffix(line, "\n"))
			}
			if !strings.HasPrefix(line, cacheFamily) {
				out = append(out, strings.TrimSpace(line))
			}
		}
		return out
	}
	compareLines(t, strip(string(get(t, e, "/metrics").body)), strip(capturedPage))
}

func TestMetricsHeaders(t *testing.T) {
	e := newEngine(t, Options{RequestIDHeader: true})
	tests := []struct {
		file, method, path string
		header             []string
	}{
		{"idle", http.MethodGet, "/metrics", nil},
		{"gzip", http.MethodGet, "/metrics", []string{"Accept-Encoding", "gzip"}},
		{"openmetrics", http.MethodGet, "/metrics", []string{"Accept", "application/openmetrics-text; version=1.0.0"}},
		{"protobuf", http.MethodGet, "/metrics", []string{"Accept", "application/vnd.google.protobuf"}},
		{"accept_0.0.1", http.MethodGet, "/metrics", []string{"Accept", "text/plain; version=1.0.0; escaping=allow-utf-8"}},
		{"head", http.MethodHead, "/metrics", nil},
		{"redirect", http.MethodGet, "/metrics/", nil},
		{"slash_gzip", http.MethodGet, "/metrics/", []string{"Accept-Encoding", "gzip"}},
		{"slash_openmetrics", http.MethodGet, "/metrics/", []string{"Accept", "application/openmetrics-text;version=1.0.0"}},
	}
	for _, tt := range tests {
		t.Run(tt.file, func(t *testing.T) {
			b, err := os.ReadFile(filepath.Join("testdata", "metrics", tt.file+".headers"))
			if err != nil {
				t.Fatal(err)
			}
			want := http.Header{}
			for _, l := range strings.Split(strings.TrimSpace(strings.ReplaceAll(string(b), "\r", "")), "\n")[1:] {
				k, v, _ := strings.Cut(l, ": ")
				want.Add(k, v)
			}
			got, err := send(t.Context(), t, tt.method, e.URL()+tt.path, "", tt.header...)
			if err != nil {
				t.Fatal(err)
			}
			compareHeaders(t, got.header, want)
			if tt.file == "slash_gzip" {
				z, err := gzip.NewReader(bytes.NewReader(got.body))
				if err != nil {
					t.Fatal(err)
				}
				page, err := io.ReadAll(z)
				if err != nil || len(page) < 48_000 || len(got.body) > 12_000 {
					t.Errorf("%d bytes of %d, %v", len(got.body), len(page), err)
				}
			}
		})
	}
}

func TestNameFilter(t *testing.T) {
	e := newEngine(t, Options{})
	want, err := os.ReadFile(filepath.Join("testdata", "slash_name_filter.prom"))
	if err != nil {
		t.Fatal(err)
	}
	if got := get(t, e, "/metrics/?name[]=vllm:num_requests_waiting").body; string(got) != string(want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if r := get(t, e, "/metrics/?name[]=nothing"); r.status != http.StatusOK || len(r.body) != 0 {
		t.Errorf("unknown name: %d %q", r.status, r.body)
	}
	two := families(t, get(t, e, "/metrics/?name[]=vllm:num_requests_running&name[]=vllm:cache_config_info").body)
	if len(two) != 2 {
		t.Errorf("two names: %v", two)
	}
	if n := len(get(t, e, "/metrics?name[]=vllm:num_requests_waiting").body); n < 48_000 {
		t.Errorf("without the slash: %d bytes", n)
	}
}

// TestOpenMetrics compares family declarations with a captured page of another server (without NIXL).
func TestOpenMetrics(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("testdata", "slash_openmetrics.prom"))
	if err != nil {
		t.Fatal(err)
	}
	declared := func(page string) []string {
		var out []string
		for line := range strings.Lines(page) {
			if strings.HasPrefix(line, "# TYPE") && !strings.Contains(line, "nixl") && !strings.Contains(line, "kv_fetch") {
				out = append(out, strings.TrimSpace(line))
			}
		}
		sort.Strings(out)
		return out
	}
	e := newEngine(t, Options{})
	got := string(get(t, e, "/metrics/", "Accept", "application/openmetrics-text").body)
	compareLines(t, declared(got), declared(string(b)))
	if !strings.HasSuffix(got, "# EOF\n") || !strings.Contains(got, `vllm_num_requests_running{engine="0",model_name="tiny"} 0.0`) {
		t.Error("not OpenMetrics")
	}
}

func TestPageOptions(t *testing.T) {
	e := newEngine(t, Options{MetricsPage: MetricsPage{Padding: 50_000, IdleNaN: true}})
	page := get(t, e, "/metrics").body
	if len(page) < 105_000 {
		t.Errorf("padded page of %d bytes", len(page))
	}
	families(t, page)
	if v := metric(t, e, "vllm:kv_cache_usage_perc"); v != "NaN" {
		t.Errorf("idle usage: %s", v)
	}
}

// TestIdleFootprint bounds what an idle engine of a pool costs (F20).
func TestIdleFootprint(t *testing.T) {
	for name, o := range map[string]Options{"nixl": {}, "mooncake": {Connector: "mooncake"}, "ranks": {Ranks: 8}} {
		t.Run(name, func(t *testing.T) { idleFootprint(t, o) })
	}
}

func idleFootprint(t *testing.T, o Options) {
	t.Helper()
	const n = 200
	o.NumBlocks = 65536
	ranks, servers := int64(max(o.Ranks, 1)), 1
	if o.Connector == connectorMooncake {
		servers = 2
	}
	p, err := NewPool(PoolOptions{Plain: n, Template: o})
	if err != nil {
		t.Fatal(err)
	}
	before := liveBytes()
	routines := runtime.NumGoroutine()
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	for _, e := range p.Engines() {
		e.running().metricsPage(nil, nil, Faults{})
	}
	if each := (liveBytes() - before) / n / ranks; each > 100_000 {
		t.Errorf("%d bytes per idle rank", each)
	} else {
		t.Logf("%d bytes per idle rank", each)
	}
	if g := runtime.NumGoroutine() - routines; g > n*servers {
		t.Errorf("%d goroutines for %d engines", g, n)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// liveBytes is the memory that is in use. What a sync.Pool keeps goes with the second collection.
func liveBytes() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc) + int64(m.StackInuse)
}

func TestMetricsPageAllocations(t *testing.T) {
	e := newEngine(t, Options{})
	buf := make([]byte, 0, 1<<17)
	names := []string{"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
	for name, names := range map[string][]string{"filtered": names, "whole": nil} {
		alloctest.AtMost(t, 0, name, func() { buf = e.running().metricsPage(buf[:0], names, Faults{}) })
	}
}

func BenchmarkMetricsPage(b *testing.B) {
	e, err := New(Options{})
	if err != nil {
		b.Fatal(err)
	}
	p := newProcess(e, e.Addr())
	buf := make([]byte, 0, 1<<17)
	for _, names := range [][]string{nil, {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}} {
		b.Run(fmt.Sprintf("names=%d", len(names)), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				buf = p.metricsPage(buf[:0], names, Faults{})
			}
			b.SetBytes(int64(len(buf)))
		})
	}
}

func BenchmarkParse(b *testing.B) {
	e, err := New(Options{NumBlocks: 65536})
	if err != nil {
		b.Fatal(err)
	}
	body := []byte(`{"model":"tiny","messages":[{"role":"user","content":"` + strings.Repeat("some words ", 400*1024/11) + `"}],"max_tokens":8}`)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, bad := e.parse(apiChat, http.Header{}, body); bad != nil {
			b.Fatal(bad)
		}
	}
}
