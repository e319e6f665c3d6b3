// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/metricsscraper"
	"github.com/baton-epp/baton/pool"
)

func TestEnginePageSlotsExist(t *testing.T) {
	for _, source := range []string{sglangPage, trtllmPage} {
		for line := range strings.Lines(source) {
			words := strings.Fields(line)
			if words[0] == "histogram" {
				if captured().histograms[words[2]] == nil {
					t.Errorf("%s: no histogram %s", words[1], words[2])
				}
				continue
			}
			key, live := strings.CutPrefix(words[len(words)-1], "@")
			if words[0] == "#" || !live {
				continue
			}
			if _, ok := captured().index[key]; !ok && !strings.HasPrefix(key, "derived:") {
				t.Errorf("no live value %s", key)
			}
			if engineSample("", "", "@"+key).slot == 0 {
				t.Errorf("%s has no slot", key)
			}
		}
	}
}

// scraped is what Baton's scraper reads off e's page.
func scraped(t *testing.T, e *Engine, engineType string) pool.Metrics {
	t.Helper()
	scraper, err := metricsscraper.New(metricsscraper.Options{
		Scraping: config.Scraping{
			BusyInterval: 5 * time.Millisecond, IdleInterval: 5 * time.Millisecond, Timeout: 10 * time.Second, MaxPageBytes: 1 << 20,
		},
		MinInterval: 5 * time.Millisecond,
		Logger:      slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	end := &pool.Endpoint{
		Name: e.Name(), Addr: e.Addr(), Hostport: e.Addr().String(), Labels: map[string]string{pool.LabelEngine: engineType},
		State: &pool.State{},
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- scraper.Run(ctx) }()
	scraper.Sync(pool.NewSnapshot(1, true, []*pool.Endpoint{end}))
	eventually(t, "a scrape", func() bool { return end.Metrics().Fresh(time.Now()) })
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return *end.Metrics()
}

// TestScraperReadsEveryEngine drives each engine into a known state and reads it with Baton's own scraper.
func TestScraperReadsEveryEngine(t *testing.T) {
	for _, tt := range []struct{ engine, generation, label string }{
		{"", "", "vllm"},
		{"", generationOld, "vllm"},
		{engineSGLang, "", "sglang"},
		{engineTRTLLM, "", "trtllm-serve"},
	} {
		t.Run(tt.label+tt.generation, func(t *testing.T) {
			e := newEngine(t, Options{
				Engine: tt.engine, Generation: tt.generation, Model: `m"1`, BlockSize: 16, NumBlocks: 101, MaxNumSeqs: 2,
				InterToken: time.Hour, PrefillFixed: -1, PrefillPerToken: -1,
			})
			if m := scraped(t, e, tt.label); m.Running != 0 || m.Waiting != 0 || m.KVCacheUsage != 0 {
				t.Errorf("idle: %+v", m)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			for i := range 5 {
				go func() { _, _ = send(ctx, t, "POST", e.URL()+"/v1/completions", `{"prompt":`+prompt(160, i)+`}`) }()
			}
			eventually(t, "2 run, 3 wait", func() bool { s := e.Stats(); return s.Running == 2 && s.Waiting == 3 })
			m := scraped(t, e, tt.label)
			const want = pool.HasRunning | pool.HasWaiting | pool.HasKVCacheUsage | pool.HasCacheConfig
			if m.Has&want != want {
				t.Errorf("has %b, want %b", m.Has, want)
			}
			if m.Running != 2 || m.Waiting != 3 || m.KVCacheUsage != e.Stats().KVCacheUsage || m.KVCacheUsage < 0.19 {
				t.Errorf("running %v, waiting %v, usage %v of %v", m.Running, m.Waiting, m.KVCacheUsage, e.Stats().KVCacheUsage)
			}
			if m.BlockSize != 16 || m.NumBlocks != 101 {
				t.Errorf("cache: %d blocks of %d", m.NumBlocks, m.BlockSize)
			}
			families(t, get(t, e, "/metrics").body)
			cancel()
			settle(t, e)
		})
	}
}

func TestEnginePageLabels(t *testing.T) {
	sglang := newEngine(t, Options{Engine: engineSGLang, Role: "decode", Model: "m"})
	for _, line := range []string{
		`sglang:num_queue_reqs{engine_type="decode",model_name="m",pp_rank="0",tp_rank="0"} 0.0`,
		`sglang:num_decode_prealloc_queue_reqs{engine_type="decode",model_name="m",pp_rank="0",tp_rank="0"} 0.0`,
		`sglang:time_to_first_token_seconds_count{engine_type="decode",model_name="m",pp_rank="0",tp_rank="0"} 0.0`,
	} {
		if page := string(get(t, sglang, "/metrics").body); !strings.Contains(page, line+"\n") || strings.Contains(page, "vllm") {
			t.Errorf("no line %s in\n%s", line, page)
		}
	}
	trt := newEngine(t, Options{Engine: engineTRTLLM, Model: "m", MetricsPage: MetricsPage{Padding: 5000}})
	page := get(t, trt, "/metrics/", "Accept", "application/openmetrics-text").body
	if !strings.Contains(string(page), `trtllm_kv_cache_tokens_per_block{engine_type="unified",model_name="m"} 16.0`) || len(page) < 7000 {
		t.Errorf("page: %s", page)
	}
	if n := len(families(t, get(t, trt, "/metrics/?name[]=trtllm_num_requests_running&name[]=trtllm_num_requests_waiting").body)); n != 2 {
		t.Errorf("%d families of two names", n)
	}
}

// TestScraperReadsTransferQueues has a prefill leg wait for its decode leg, and a decode leg for its prefill leg.
func TestScraperReadsTransferQueues(t *testing.T) {
	p, d := newPair(t, patient)
	prefill := start(t, p, "/v1/completions", complete(prompt(90, 1), 6, roomOf(p, 7)))
	decode := start(t, d, "/v1/completions", complete(prompt(90, 1), 6, roomOf(p, 8)))
	eventually(t, "both wait", func() bool { return bootstraps(p) && d.Stats().Deferred == 1 })
	page := string(get(t, p, "/metrics").body)
	if !strings.Contains(page, `sglang:num_prefill_bootstrap_queue_reqs{engine_type="prefill",model_name="tiny",pp_rank="0",tp_rank="0"} 1.0`+"\n") {
		t.Errorf("prefill: %s", page)
	}
	if m := scraped(t, d, "sglang"); m.Waiting != 1 || m.Running != 0 {
		t.Errorf("decode: waiting %v, running %v", m.Waiting, m.Running)
	}
	prefill.cancel()
	decode.cancel()
	settle(t, p)
	settle(t, d)
}
