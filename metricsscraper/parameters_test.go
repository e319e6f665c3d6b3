// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
)

func parameters(t *testing.T, text string) config.Parameters {
	t.Helper()
	p, err := config.Parse("f", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestDecodeSource(t *testing.T) {
	got, err := DecodeSource(parameters(t, "{scheme: https, path: /m, port: 9400, interval: 100ms, insecureSkipVerify: false}"))
	if err != nil || got != (Source{Scheme: "https", Path: "/m", Port: 9400, Interval: 100 * time.Millisecond}) {
		t.Errorf("%+v %v", got, err)
	}
	if got, err = DecodeSource(config.Parameters{}); err != nil || got != DefaultSource() {
		t.Errorf("%+v %v", got, err)
	}
	_, err = DecodeSource(parameters(t, "{scheme: ftp,\n path: m,\n interval: -1s,\n clientCertPath: x}"))
	want := "f:1: scheme: \"ftp\", must be http or https\nf:2: path: \"m\", must begin with /\nf:3: interval: -1s, must be ≥ 0\nf:4: clientCertPath: clientCertPath and clientKeyPath go together"
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}

func TestDecodeEngines(t *testing.T) {
	x, err := DecodeEngines(parameters(t, `
engineLabelKey: engine
defaultEngine: mine
engineConfigs:
- name: mine
  queuedRequestsSpec: my_queue{kind=a, other="b"}
  runningRequestsSpec: my_running
  cacheInfoSpec: my_cache
  cacheBlockSizeLabelName: bs
- name: vllm
  kvUsageSpec: vllm:other_usage
  customMetrics: [{attributeKey: k, metricSpec: m}]
`))
	if err != nil {
		t.Fatal(err)
	}
	if !x.CustomMetrics {
		t.Error("customMetrics not noticed")
	}
	page := "my_queue{kind=\"a\",other=\"b\"} 1\nmy_queue{kind=\"c\"} 9\nmy_running 2\nmy_cache{bs=\"8\",num_gpu_blocks=\"4\"} 1\nvllm:num_requests_running 7\nvllm:kv_cache_usage_perc 0.5\nvllm:other_usage 0.25\n"
	f := func(labels map[string]string, want pool.Metrics) {
		t.Helper()
		var r reading
		var e extractor
		got := &pool.Metrics{}
		x.of(&pool.Endpoint{Labels: labels}).scan([]byte(page), &r)
		e.extract(&r, got, &pool.Metrics{}, true)
		if diff := cmp.Diff(&want, got); diff != "" {
			t.Errorf("%v (-want +got):\n%s", labels, diff)
		}
	}
	mine := pool.Metrics{Has: pool.HasWaiting | pool.HasRunning | pool.HasCacheConfig, Waiting: 1, Running: 2, BlockSize: 8, NumBlocks: 4}
	f(nil, mine)
	f(map[string]string{"engine": "unheard-of", pool.LabelEngine: "vllm"}, mine)
	f(map[string]string{"engine": "vllm"}, pool.Metrics{Has: pool.HasRunning | pool.HasKVCacheUsage, Running: 7, KVCacheUsage: 0.25})
}

func TestDecodeEnginesErrors(t *testing.T) {
	f := func(text, want string) {
		t.Helper()
		_, err := DecodeEngines(parameters(t, text))
		if err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	f("{defaultEngine: x}", "f:1: defaultEngine: \"x\", no such engine")
	f("engineConfigs: [{name: a, kvUsageSpec: 'b{c'}, {name: a}, {}]", "f:1: engineConfigs[0].kvUsageSpec: \"b{c\", must be name or name{label=value,…}\nf:1: engineConfigs[1].name: \"a\", must be a name that is not there yet\nf:1: engineConfigs[2].name: \"\", must be a name that is not there yet")
	f("{engines: []}", "f:1: engines: unknown key, known here: engineLabelKey, defaultEngine, engineConfigs")
}

func TestEngineLabels(t *testing.T) {
	x := DefaultEngines()
	f := func(labels map[string]string, want string) {
		t.Helper()
		if x.of(&pool.Endpoint{Labels: labels}) != x.tables[want] {
			t.Errorf("%v is not %s", labels, want)
		}
	}
	f(nil, "vllm")
	f(map[string]string{pool.LabelEngine: "sglang", pool.LabelEngineGIE: "triton"}, "sglang")
	f(map[string]string{pool.LabelEngineGIE: "trtllm-serve"}, "trtllm-serve")
	f(map[string]string{pool.LabelEngine: "unheard-of"}, "vllm")
}
