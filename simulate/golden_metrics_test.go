// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestGoldenMetrics runs the captured prefill and decode legs on fresh engines and compares every vLLM sample that is not
// a time with the real servers' pages: P with its blocks pinned, P after the pull, D after its answer.
func TestGoldenMetrics(t *testing.T) {
	o := goldenOptions("pd")
	o.Lease = 10 * time.Hour
	p, d := goldenPair(t, o, 0)
	g := readGolden(t, "pd", "prefill_basic")
	r := post(t, p, "/v1/completions", g.request)
	var v struct {
		KV json.RawMessage `json:"kv_transfer_params"`
	}
	if err := json.Unmarshal(r.body, &v); err != nil {
		t.Fatal(err)
	}
	compareSamples(t, p, "prefill_metrics_pinned")
	var body map[string]json.RawMessage
	if err := json.Unmarshal([]byte(readGolden(t, "pd_decode", "decode_basic").request), &body); err != nil {
		t.Fatal(err)
	}
	body["kv_transfer_params"] = v.KV
	post(t, d, "/v1/completions", string(marshal(body)))
	compareSamples(t, p, "prefill_metrics_after")
	compareSamples(t, d, "decode_metrics_after")
}

func compareSamples(t *testing.T, e *Engine, file string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "metrics", file+".prom"))
	if err != nil {
		t.Fatal(err)
	}
	samples := func(page string) map[string]string {
		out := map[string]string{}
		for line := range strings.Lines(page) {
			name, prefix, value := splitSample(strings.TrimSpace(line))
			if strings.HasPrefix(name, "vllm:") && name != cacheFamily && !strings.Contains(name, "seconds") && !strings.HasSuffix(name, "_created") {
				out[prefix] = value
			}
		}
		return out
	}
	got, want := samples(string(get(t, e, "/metrics").body)), samples(string(b))
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if got[k] != want[k] {
			t.Errorf("%s: %s is %s, want %s", file, k, got[k], want[k])
		}
		delete(got, k)
	}
	for k := range got {
		t.Errorf("%s: %s is not in the capture", file, k)
	}
}

// peerExchange is what a router sent and the real server answered.
type peerExchange struct {
	path, body, answer string
	header             []string
	status             string
}

func readPeer(t *testing.T, file string) (out []peerExchange) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "peer", file+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	for one := range strings.SplitSeq("\n"+string(b), "\n> POST ") {
		if strings.TrimSpace(one) == "" {
			continue
		}
		ask, answer, ok := strings.Cut(one, "\n< ")
		if !ok {
			t.Fatalf("%s: %.80q has no answer", file, one)
		}
		var x peerExchange
		lines := strings.Split(ask, "\n")
		x.path, x.body = lines[0], lines[len(lines)-1]
		for _, l := range lines[1 : len(lines)-1] {
			if k, v, _ := strings.Cut(strings.TrimPrefix(l, "> "), ": "); k == "x-request-id" {
				x.header = []string{k, v}
			}
		}
		x.status, x.answer, _ = strings.Cut(answer, "\n")
		out = append(out, x)
	}
	return out
}

// TestGoldenPeer repeats what vllm-router sent to a real pair, and compares the answers.
func TestGoldenPeer(t *testing.T) {
	o := goldenOptions("pd")
	o.ScaleOut, o.Lease = false, 10*time.Hour
	p, d := goldenPair(t, o, 0)
	legs, decodes := readPeer(t, "vllm_router_prefill_leg"), readPeer(t, "vllm_router_decode_leg")
	if len(legs) != 4 || len(decodes) != 4 {
		t.Fatalf("%d and %d exchanges", len(legs), len(decodes))
	}
	for i, leg := range legs {
		r := comparePeer(t, p, leg)
		var v struct {
			KV json.RawMessage `json:"kv_transfer_params"`
		}
		if json.Unmarshal(r.body, &v) == nil && len(v.KV) > 0 {
			head, _, ok := strings.Cut(decodes[i].body, `"kv_transfer_params":`)
			if !ok {
				t.Fatalf("decode leg %d has no handle", i)
			}
			decodes[i].body = head + `"kv_transfer_params":` + string(v.KV) + "}"
		}
		comparePeer(t, d, decodes[i])
	}
	if pulls := d.Pulls(); len(pulls) != 2 || pulls[0].Wrong || !pulls[0].Verbatim {
		t.Errorf("pulls: %+v", pulls)
	}
}

func comparePeer(t *testing.T, e *Engine, x peerExchange) reply {
	t.Helper()
	r := post(t, e, x.path, x.body, x.header...)
	switch {
	case http.StatusText(r.status) == "" || !strings.HasPrefix(x.status, "200") && r.status == http.StatusOK:
		t.Errorf("%s: %d, want %s", x.path, r.status, x.status)
	case r.status >= 400:
		compareLines(t, []string{string(r.body)}, []string{strings.TrimSpace(x.answer)})
	case strings.HasPrefix(x.answer, "data: "):
		compareLines(t, events(t, string(r.body)), events(t, x.answer))
	default:
		compareLines(t, []string{shape(t, string(r.body))}, []string{shape(t, x.answer)})
	}
	return r
}
