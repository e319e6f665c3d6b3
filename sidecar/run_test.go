// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/sidecar/connectors"
	"github.com/baton-epp/baton/simulate"
)

// TestPrefillThenDecode is the whole of P/D on simulated engines (S0-22, P/D row of section 7): one one-token prefill,
// then a decode that pulls, with the handle byte for byte as it was given out, and the same text as without prefill.
func TestPrefillThenDecode(t *testing.T) {
	for _, odd := range []bool{false, true} {
		r, peers := newRig(t, nil), simulate.NewRegistry()
		p, pe := r.engine("p", "prefill", peers, nil)
		d, de := r.engine("d", "decode", peers, nil)
		if odd { // integers above 2^53, escapes, another key order
			if err := p.SetFaults(simulate.Faults{Rules: []simulate.Fault{{Phase: "prefill", Kind: "odd_handle"}}}); err != nil {
				t.Fatal(err)
			}
		}
		_, plain := decode(t, de, r.job(inference.Completions, clientBody, de))
		if err := d.Restart(); err != nil { // forget the prompt
			t.Fatal(err)
		}

		j := r.job(inference.Completions, clientBody, de, pe)
		j.Request.Headers = inference.Headers{
			{Name: "authorization", Value: "Bearer s"},
			{Name: "accept", Value: "text/event-stream"},
			{Name: "cookie", Value: "c"},
			{Name: "traceparent", Value: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
			{Name: "tracestate", Value: "a=b"},
		}
		out := r.run(j)
		if out.Name != "disaggregated" || out.Prefiller != pe || !out.HasHandle || out.PrefillTokens == 0 || reasons(out) != "ok" {
			t.Fatalf("outcome %+v", out)
		}
		_ = r.Forward(t.Context(), j, out, de)
		if code, text := decode(t, de, j); code != http.StatusOK || text != plain {
			t.Errorf("decode answers %d %q, alone %q", code, text, plain)
		}
		r.Transferred(t.Context(), out, de, true)

		got := p.Bodies()
		if len(got) != 1 || got[0].Phase != "prefill" {
			t.Fatalf("prefill saw %d requests", len(got))
		}
		wantHeaders := http.Header{
			"Accept": {"application/json"}, "Accept-Encoding": {"identity"}, "Content-Type": {"application/json"}, "User-Agent": {"baton"},
			"Authorization": {"Bearer s"}, "X-Request-Id": {"req-1"}, "X-Processor-Attempt": {"1"}, "X-Baton-Depth": {"1"},
			"Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, "Tracestate": {"a=b"},
		}
		delete(got[0].Header, "Content-Length")
		if diff := cmp.Diff(wantHeaders, got[0].Header); diff != "" {
			t.Errorf("headers (-want +got):\n%s", diff)
		}
		if pulls := d.Pulls(); len(pulls) != 1 || !pulls[0].Verbatim || pulls[0].Wrong || pulls[0].Tokens == 0 {
			t.Errorf("pulls %+v", pulls)
		}
		eventually(t, "blocks free", func() bool { return len(p.Held()) == 0 && len(d.Held()) == 0 })
		for _, c := range []string{"PREFILL_SELECTED", "PREFILL_COMPLETE", "DECODE_FORWARDED", "TRANSFER_COMPLETE"} {
			r.want(1, "checkpoints_total", c)
		}
		r.want(1, "attempts_total", "prefill", "ok")
		r.want(0, "leaked_prefill_total")
		r.want(1, "phase_duration_seconds")
	}
}

// TestEveryAPI prefills each API on a simulated engine, generate with its handle in extra_args (defects 3 and 4 of
// llm-d's decode sidecar).
func TestEveryAPI(t *testing.T) {
	r, peers := newRig(t, nil), simulate.NewRegistry()
	p, pe := r.engine("p", "prefill", peers, nil)
	d, de := r.engine("d", "decode", peers, nil)
	f := func(api inference.API, body string) {
		t.Helper()
		j := r.job(api, body, de, pe)
		out := r.run(j)
		if !out.HasHandle {
			t.Errorf("%s: %s after %s", enginePath(api), out.Name, reasons(out))
			return
		}
		before := len(d.Pulls())
		if code, _ := decode(t, de, j); code != http.StatusOK || len(d.Pulls()) != before+1 {
			t.Errorf("%s: decode answered %d, pulls %d", enginePath(api), code, len(d.Pulls())-before)
		}
	}
	f(inference.Chat, `{"model":"tiny","messages":[{"role":"user","content":"first words first, then more of them, and more"}],"max_completion_tokens":9,"stream":false}`)
	f(inference.Completions, `{"model":"tiny","prompt":"second words of another prompt with enough to say for a block","max_tokens":9,"min_tokens":3,"n":2}`)
	f(inference.Responses, `{"model":"tiny","input":"third words that nobody has said before in this long test","max_output_tokens":9}`)
	f(inference.Messages, `{"model":"tiny","messages":[{"role":"user","content":"fourth words, from another world, equally many of them"}],"max_tokens":9}`)
	f(inference.Generate, `{"model":"tiny","token_ids":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20],"sampling_params":{"max_tokens":9,"min_tokens":2,"extra_args":{"x":1}}}`)
	for _, b := range p.Bodies() {
		if b.Phase != "prefill" {
			t.Errorf("prefill saw %s %s", b.URI, b.Body)
		}
	}
	if s := p.Stats(); s.GenerationTokens != 5 {
		t.Errorf("prefill generated %d tokens for 5 requests", s.GenerationTokens)
	}
}

// TestModes is one prefill call in orchestrate mode, none in headers mode, and what the decode endpoint's sidecar
// changes (docs/design.md 3.2).
func TestModes(t *testing.T) {
	type want struct {
		calls  int
		header bool
		name   string
	}
	f := func(mode string, sidecar pool.Sidecar, w want) {
		t.Helper()
		calls := 0
		r := newRig(t, func(c *config.Disaggregation) { c.Mode = mode })
		pe := r.server("p", func(w http.ResponseWriter, req *http.Request) { calls++; answer(goodAnswer)(w, req) })
		de := r.add("d", "decode", "10.9.9.9:8000")
		de.Sidecar = sidecar
		j := r.job(inference.Completions, clientBody, de, pe)
		out, err := r.Run(t.Context(), j)
		if err != nil {
			t.Fatal(err)
		}
		header := len(out.Headers) == 1 && out.Headers[0] == inference.Header{Name: HeaderPrefiller, Value: pe.Hostport}
		handle := strings.Contains(decodeBody(j), goodHandle)
		if calls != w.calls || header != w.header || out.Name != w.name || handle != (w.calls == 1) || out.HasHandle != handle {
			t.Errorf("%s, sidecar %d: %d calls, headers %v, handle %v, outcome %s", mode, sidecar, calls, out.Headers, handle, out.Name)
		}
		if r.Mode() != mode || r.Rank() != 3 {
			t.Errorf("mode %s, rank %d", r.Mode(), r.Rank())
		}
	}
	f("auto", pool.SidecarUnknown, want{1, false, "disaggregated"})
	f("auto", pool.SidecarAbsent, want{1, true, "disaggregated"})
	f("auto", pool.SidecarPresent, want{0, true, "disaggregated"})
	f("orchestrate", pool.SidecarUnknown, want{1, true, "disaggregated"})
	f("orchestrate", pool.SidecarAbsent, want{1, true, "disaggregated"})
	f("orchestrate", pool.SidecarPresent, want{1, false, "disaggregated"})
	f("headers", pool.SidecarUnknown, want{0, true, "disaggregated"})
	f("headers", pool.SidecarPresent, want{0, true, "disaggregated"})
	f("off", pool.SidecarAbsent, want{0, false, "aggregated"})
}

// TestAggregatedFromTheStart sends nothing for requests that cannot be split.
func TestAggregatedFromTheStart(t *testing.T) {
	f := func(name string, change func(*config.Disaggregation), job func(*rig, *pool.Endpoint) *Job) {
		t.Helper()
		r := newRig(t, change)
		pe := r.server("p", func(http.ResponseWriter, *http.Request) { t.Errorf("%s: prefill was called", name) })
		out := r.run(job(r, pe))
		if out.Name != "aggregated" || len(out.Headers)+len(out.Attempts) != 0 {
			t.Errorf("%s: %+v", name, out)
		}
		r.want(0, "fallbacks_total")
	}
	f("no prefill picked", nil, func(r *rig, _ *pool.Endpoint) *Job { return r.job(inference.Completions, clientBody, nil) })
	f("echo", nil, func(r *rig, p *pool.Endpoint) *Job {
		return r.job(inference.Completions, `{"prompt":"x","echo":true}`, nil, p)
	})
	f("embeddings", nil, func(r *rig, p *pool.Endpoint) *Job {
		return r.job(inference.Embeddings, `{"input":"x"}`, nil, p)
	})
	f("no body", nil, func(r *rig, p *pool.Endpoint) *Job {
		j := r.job(inference.Completions, clientBody, nil, p)
		j.Body = nil
		return j
	})
	f("wire without that API", nil, func(r *rig, p *pool.Endpoint) *Job {
		return r.job(inference.SGLangGenerate, `{"text":"x"}`, nil, p)
	})
	f("decode is the best prefiller", nil, func(r *rig, p *pool.Endpoint) *Job {
		return r.job(inference.Completions, clientBody, p, p)
	})
	f("caller orchestrates", func(c *config.Disaggregation) { c.AcceptClientTransferFields = true },
		func(r *rig, p *pool.Endpoint) *Job {
			return r.job(inference.Completions, `{"prompt":"x","kv_transfer_params":{"a":1}}`, nil, p)
		})
}

// TestClientHandleIsStripped: a client can end a decode server's process with one (seen on vLLM 0.32).
func TestClientHandleIsStripped(t *testing.T) {
	body := `{"prompt":"x","kv_transfer_params":{"do_remote_prefill":true}}`
	r := newRig(t, nil)
	j := r.job(inference.Completions, body, nil)
	r.run(j)
	if got := decodeBody(j); strings.Contains(got, "kv_transfer") {
		t.Errorf("decode gets %s", got)
	}
	r = newRig(t, func(c *config.Disaggregation) { c.AcceptClientTransferFields = true })
	j = r.job(inference.Completions, body, nil)
	r.run(j)
	if got := decodeBody(j); got != body {
		t.Errorf("decode gets %s", got)
	}
}

// TestModelRewritten asks the prefiller for the model that decode is asked for.
func TestModelRewritten(t *testing.T) {
	var got string
	r := newRig(t, func(c *config.Disaggregation) { c.Mode = "orchestrate" })
	pe := r.server("p", func(w http.ResponseWriter, req *http.Request) {
		b := new(strings.Builder)
		_ = req.Write(b)
		got = b.String()
		answer(goodAnswer)(w, req)
	})
	j := r.job(inference.Completions, clientBody, nil, pe)
	j.Model = "base-v2"
	if out := r.run(j); !out.HasHandle || !strings.Contains(got, `"model":"base-v2"`) {
		t.Errorf("%s; prefill got %s", out.Name, got)
	}
}

// blind is a wire without handles: the engines meet in a store (shape two of docs/design.md 3.3).
type blind struct{}

func (blind) Prefill(x *connectors.Exchange, body *inference.Edits) {
	connectors.OneToken(x.Request, body)
}

func (blind) Answer(*connectors.Exchange, []byte) connectors.Answer  { return connectors.Answer{} }
func (blind) Decode(*connectors.Exchange, []byte, *inference.Edits)  {}
func (blind) Withdraw(x *connectors.Exchange, body *inference.Edits) {}

// TestOtherShapes: a wire without handles and one that cannot go on alone need no change here.
func TestOtherShapes(t *testing.T) {
	traits := connectors.Traits{Name: "blind", Aggregates: true, APIs: []inference.API{inference.Completions}}
	r := newRig(t, nil)
	d := r.add("d", "decode", "10.9.9.9:8000")
	r.settings.Load().wires[""] = wire{blind{}, traits}
	j := r.job(inference.Completions, clientBody, d, r.server("p", answer(`{}`)))
	out := r.run(j)
	_ = r.Forward(t.Context(), j, out, d)
	if out.Name != "disaggregated" || out.HasHandle || decodeBody(j) != clientBody || out.Checkpoint != DecodeForwarded {
		t.Errorf("%+v; decode gets %s", out, decodeBody(j))
	}
	traits.Aggregates = false
	r.settings.Load().wires[""] = wire{blind{}, traits}
	if _, err := r.Run(t.Context(), r.job(inference.Completions, clientBody, d, r.server("bad", status(500)))); err == nil {
		t.Error("went on alone on a wire that cannot")
	}
	traits.NeedsDecode = true
	r.settings.Load().wires[""] = wire{blind{}, traits}
	if out := r.run(r.job(inference.Completions, clientBody, nil, r.server("p2", answer(`{}`)))); out.Name != "aggregated" {
		t.Errorf("%+v", out)
	}
}
