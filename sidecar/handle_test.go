// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/simulate"
)

// prefilled returns a rig, a job and its outcome after a good prefill.
func prefilled(t *testing.T, change func(*config.Disaggregation)) (*rig, *Job, *Outcome) {
	t.Helper()
	r := newRig(t, change)
	p := r.server("p", answer(goodAnswer))
	j := r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.1:8000"), p)
	out := r.run(j)
	if !out.HasHandle || out.PrefillTokens != 77 {
		t.Fatalf("%+v", out)
	}
	return r, j, out
}

// alone checks that decode goes on without a handle, and that the prefill was counted as lost for that reason.
func (r *rig) alone(j *Job, out *Outcome, reason string) {
	r.t.Helper()
	if out.HasHandle || out.Prefiller != nil || len(out.Headers) != 0 || out.Name != "fallback-"+reason || decodeBody(j) != clientBody {
		r.t.Errorf("%+v; decode gets %s", out, decodeBody(j))
	}
	r.want(1, "leaked_prefill_total", reason)
	r.want(77, "leaked_prefill_tokens_total")
	r.want(1, "fallbacks_total", reason)
}

// TestHandleLeavesOnce: a handle used again may answer 200 with another prompt's KV (seen on vLLM 0.32).
func TestHandleLeavesOnce(t *testing.T) {
	r, j, out := prefilled(t, nil)
	d2 := r.add("d2", "decode", "10.9.9.2:8000")
	_ = r.Forward(t.Context(), j, out, d2) // decode was picked anew: that alone is no second use
	if !out.HasHandle || out.Checkpoint != DecodeForwarded {
		t.Fatalf("%+v", out)
	}
	_ = r.Forward(t.Context(), j, out, d2)
	r.alone(j, out, "handle_used")
}

// TestHandleTooOld: under the engine's lease, or not at all (docs/design.md 3.3).
func TestHandleTooOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		net := r.bubble()
		late := net.server("late", func(w http.ResponseWriter, req *http.Request) {
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			time.Sleep(26 * time.Second)
			answer(goodAnswer)(w, req)
		})
		good := net.server("good", answer(goodAnswer))
		d := r.add("d", "decode", "10.9.9.1:8000")
		j := r.job(inference.Completions, clientBody, d, good)
		out := r.run(j)
		time.Sleep(25 * time.Second)
		_ = r.Forward(t.Context(), j, out, d)
		if !out.HasHandle {
			t.Error("25 s is not too old")
		}

		j = r.job(inference.Completions, clientBody, d, good)
		out = r.run(j)
		time.Sleep(25*time.Second + 1)
		_ = r.Forward(t.Context(), j, out, d)
		r.alone(j, out, "handle_expired")
		r.Abandon(t.Context(), j, out, "client_gone")
		r.want(1, "leaked_prefill_total")

		// Its age counts from the answer's headers: a body that takes too long is late when it ends.
		out = r.run(r.job(inference.Completions, clientBody, d, late, good))
		if reasons(out) != "handle_expired ok" || out.Prefiller != good {
			t.Errorf("%s", reasons(out))
		}
		r.want(2*77, "leaked_prefill_tokens_total")
	})
}

// TestHandleForOtherEngine: decode was picked anew and reads other handles.
func TestHandleForOtherEngine(t *testing.T) {
	r, j, out := prefilled(t, nil)
	other := r.add("d2", "decode", "10.9.9.2:8000")
	other.Engine = "sglang"
	r.settings.Load().wires["sglang"] = wire{}
	_ = r.Forward(t.Context(), j, out, other)
	r.alone(j, out, "engine_mismatch")
}

// TestForwardElsewhere sets the header as the endpoint that is finally used needs it.
func TestForwardElsewhere(t *testing.T) {
	r, j, out := prefilled(t, func(c *config.Disaggregation) { c.Mode = "orchestrate" })
	if len(out.Headers) != 1 {
		t.Fatalf("%+v", out.Headers)
	}
	withSidecar := r.add("d2", "decode", "10.9.9.2:8000")
	withSidecar.Sidecar = pool.SidecarPresent
	_ = r.Forward(t.Context(), j, out, withSidecar)
	if len(out.Headers) != 0 || !out.HasHandle {
		t.Errorf("%+v", out)
	}

	r = newRig(t, nil) // headers were for a sidecar that the new endpoint does not have
	withSidecar = r.add("d", "decode", "10.9.9.1:8000")
	withSidecar.Sidecar = pool.SidecarPresent
	j = r.job(inference.Completions, clientBody, withSidecar, r.add("p", "prefill", "10.9.9.3:8000"))
	out, err := r.Run(t.Context(), j)
	if err != nil || len(out.Headers) != 1 {
		t.Fatalf("%+v, %v", out, err)
	}
	_ = r.Forward(t.Context(), j, out, r.add("d2", "decode", "10.9.9.2:8000"))
	if len(out.Headers) != 0 || out.Name != "fallback-decode_changed" {
		t.Errorf("%+v", out)
	}
}

// TestTransferred counts the end of a transfer once, and by whom it was served.
func TestTransferred(t *testing.T) {
	r, j, out := prefilled(t, nil)
	r.Transferred(t.Context(), out, j.Decode, true) // not forwarded yet
	r.want(0, "checkpoints_total", "TRANSFER_COMPLETE")
	_ = r.Forward(t.Context(), j, out, j.Decode)
	r.Transferred(t.Context(), out, j.Decode, true)
	r.Transferred(t.Context(), out, j.Decode, false)
	r.want(1, "checkpoints_total", "TRANSFER_COMPLETE")
	r.want(0, "transfers_failed_total")
	if out.Checkpoint != TransferComplete {
		t.Errorf("%v", out.Checkpoint)
	}

	r, j, out = prefilled(t, nil)
	_ = r.Forward(t.Context(), j, out, j.Decode)
	r.Transferred(t.Context(), out, r.add("d2", "decode", "10.9.9.2:8000"), true)
	r.want(1, "handle_misrouted_total")
	r.want(0, "checkpoints_total", "TRANSFER_COMPLETE")
}

// TestAbandon counts what can no longer be claimed (C5, clause f).
func TestAbandon(t *testing.T) {
	f := func(reason, label string) {
		t.Helper()
		r, j, out := prefilled(t, nil)
		r.Abandon(t.Context(), j, out, reason)
		r.Abandon(t.Context(), j, out, reason)
		r.want(1, "leaked_prefill_total", label)
		r.want(1, "leaked_prefill_total")
		r.want(77, "leaked_prefill_tokens_total")
	}
	f("client_gone", "client_gone")
	f("no_decode", "no_decode")
	f("whatever a client wrote", "other")

	r, j, out := prefilled(t, nil)
	_ = r.Forward(t.Context(), j, out, j.Decode)
	r.Transferred(t.Context(), out, nil, true)
	r.Abandon(t.Context(), j, out, "client_gone") // decode has it: the engines settle that
	r.Abandon(t.Context(), j, nil, "client_gone")
	r.Abandon(t.Context(), j, &Outcome{}, "client_gone")
	r.want(0, "leaked_prefill_total")
}

// TestAbandonAfterForward: two things that happen to a forwarded request leave the prefill to nobody; a handle leaves
// once, so nothing is reclaimed.
func TestAbandonAfterForward(t *testing.T) {
	f := func(reason string, leaks float64) {
		t.Helper()
		r, j, out := prefilled(t, func(c *config.Disaggregation) { c.Reclaim = true })
		_ = r.Forward(t.Context(), j, out, j.Decode)
		j.Body = nil // the director has dropped it by then
		r.Abandon(t.Context(), j, out, reason)
		r.Abandon(t.Context(), j, out, reason)
		r.want(leaks, "leaked_prefill_total", reason)
		r.want(leaks, "leaked_prefill_total")
		r.want(leaks*77, "leaked_prefill_tokens_total")
		r.want(0, "reclaims_total")
		r.Transferred(t.Context(), out, j.Decode, true) // says nothing about a handle that nobody read
		r.want(1-leaks, "checkpoints_total", "TRANSFER_COMPLETE")
	}
	f("refused", 1)
	f("not_sent", 1)
	f("client_gone", 0) // the decode server has it: the engines settle that
	f("no_decode", 0)
	f("whatever", 0)
}

// TestReclaim frees the blocks of a lost prefill on real wire, though the client's context is gone; without it they
// stay pinned until the lease ends.
func TestReclaim(t *testing.T) {
	for _, reclaim := range []bool{false, true} {
		r, peers := newRig(t, func(c *config.Disaggregation) { c.Reclaim = reclaim }), simulate.NewRegistry()
		p, pe := r.engine("p", "prefill", peers, nil)
		d, de := r.engine("d", "decode", peers, nil)
		j := r.job(inference.Chat, `{"model":"tiny","messages":[{"role":"user","content":"some words that take up a block or two of this engine"}],"stream":true,"max_tokens":50}`, de, pe)
		out := r.run(j)
		if len(p.Held()) != 1 {
			t.Fatalf("held %v", p.Held())
		}
		ctx, gone := contextGone(t)
		gone()
		r.Abandon(ctx, j, out, "client_gone")
		r.want(1, "leaked_prefill_total", "client_gone")
		if !reclaim {
			r.want(0, "reclaims_total")
			if len(p.Held()) != 1 {
				t.Error("nobody claimed, and still free")
			}
			continue
		}
		r.want(1, "reclaims_total", "ok")
		eventually(t, "freed", func() bool { return len(p.Held()) == 0 })
		if s := d.Stats(); s.GenerationTokens != 1 || len(d.Pulls()) != 1 {
			t.Errorf("decode generated %d tokens in %d pulls", s.GenerationTokens, len(d.Pulls()))
		}
		r.idle()
		r.Abandon(ctx, j, out, "client_gone")
		r.want(1, "reclaims_total")
	}
}

// TestRemoteHostRewritten counts corrected handles, and says once what to set.
func TestRemoteHostRewritten(t *testing.T) {
	var log bytes.Buffer
	r := newRig(t, nil)
	r.log = slog.New(slog.NewTextHandler(&log, nil))
	p := r.server("p", answer(strings.Replace(goodAnswer, `"127.0.0.1"`, `"localhost"`, 1)))
	for range 2 {
		j := r.job(inference.Completions, clientBody, nil, p)
		j.PrefillLoad.Release()
		w, _ := r.settings.Load().wire("vllm")
		out := &Outcome{}
		job := run{o: r.Orchestrator, s: r.settings.Load(), j: j, out: out, wire: w}
		a := job.newAttempt(r.add("far", "prefill", "10.0.0.7:8000"), 0)
		res := result{answered: time.Now(), answer: w.Answer(a.x, []byte(strings.Replace(goodAnswer, `"127.0.0.1"`, `"localhost"`, 1)))}
		job.deliver(t.Context(), a, &res)
		if got := decodeBody(j); !strings.Contains(got, strings.Replace(goodHandle, "127.0.0.1", "10.0.0.7", 1)) {
			t.Errorf("decode gets %s", got)
		}
	}
	r.want(2, "remote_host_rewritten_total")
	if n := strings.Count(log.String(), "VLLM_NIXL_SIDE_CHANNEL_HOST"); n != 1 {
		t.Errorf("said %d times: %s", n, log.String())
	}
	// A prefiller that is on loopback itself is right to say so.
	j := r.job(inference.Completions, clientBody, nil, p)
	r.run(j)
	if !strings.Contains(decodeBody(j), `"localhost"`) {
		t.Errorf("decode gets %s", decodeBody(j))
	}
}

// TestReload swaps what is safe to swap: the kill switch works at once, breakers survive, a bad file changes nothing.
func TestReload(t *testing.T) {
	r := newRig(t, nil)
	p := r.server("p", answer(goodAnswer))
	r.peers.note(p, false)
	c := config.Default().Disaggregation
	old := r.settings.Load().transport

	c.Mode = "off"
	if err := r.Reload(c); err != nil || r.Mode() != "off" || r.settings.Load().transport != old {
		t.Errorf("mode %s, %v", r.Mode(), err)
	}
	if out := r.run(r.job(inference.Completions, clientBody, nil, p)); out.Name != "aggregated" {
		t.Errorf("%s", out.Name)
	}
	c.Mode, c.KVConnector = "auto", map[string]string{"": "nixlv2", "sglang": "pigeon"}
	if err := r.Reload(c); err == nil || !strings.Contains(err.Error(), `disaggregation.kvConnector.sglang: "pigeon" is not a connector`) || r.Mode() != "off" {
		t.Errorf("mode %s, %v", r.Mode(), err)
	}
	c.KVConnector = map[string]string{"": "nixlv2"}
	c.Prefill.ConnectTimeout, c.Prefill.Attempts = 3*time.Second, 4
	if err := r.Reload(c); err != nil || r.settings.Load().transport == old || r.Rank() != 5 {
		t.Errorf("%v", err)
	}
	if len(r.peers.byKey) != 1 {
		t.Error("breakers forgotten")
	}
	c.Breaker.Failures = 1
	if err := r.Reload(c); err != nil || len(r.peers.byKey) != 0 {
		t.Errorf("%v, %d breakers", err, len(r.peers.byKey))
	}
	if out := r.run(r.job(inference.Completions, clientBody, nil, p)); !out.HasHandle {
		t.Errorf("%s", out.Name)
	}
}

// TestNewRefuses reports all problems together, each with its path.
func TestNewRefuses(t *testing.T) {
	c := config.Default().Disaggregation
	c.Mode = "sometimes"
	c.KVConnector = map[string]string{"": "pigeon"}
	c.ECConnector = "ec-nixl" // accepted: package config warns that it has no effect
	c.Transport.ForwardHeaders = []string{"authorization", "Host", "x-baton-depth"}
	c.Transport.CACertPath = "/does/not/exist"
	_, err := New(Options{Config: c})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		"Snapshot is required", `disaggregation.mode: "sometimes"`, `disaggregation.kvConnector: "pigeon" is not a connector`,
		"forwardHeaders[1]: host", "forwardHeaders[2]: x-baton-depth",
		"disaggregation.transport: caCertPath",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in:\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "ecConnector") {
		t.Errorf("ecConnector is refused:\n%v", err)
	}
	c = config.Default().Disaggregation
	reg := prometheus.NewRegistry()
	if _, err := New(Options{Config: c, Snapshot: func() *pool.Snapshot { return nil }, Registerer: reg}); err != nil {
		t.Error(err)
	}
}

func TestPhaseErrorText(t *testing.T) {
	f := func(e PhaseError, want string) {
		t.Helper()
		if e.Phase = 2; e.Error() != want {
			t.Errorf("%q, want %q", e.Error(), want)
		}
	}
	f(PhaseError{Endpoint: "10.0.0.7:8000", Attempt: 2, Status: 503}, "prefill 10.0.0.7:8000 attempt 2: status 503")
	f(PhaseError{Endpoint: "10.0.0.7:8000", Attempt: 1, Status: 200, Reason: "malformed"}, "prefill 10.0.0.7:8000 attempt 1: status 200 (malformed)")
	f(PhaseError{Endpoint: "10.0.0.7:8000", Attempt: 1, Err: errors.New("connection refused")}, "prefill 10.0.0.7:8000 attempt 1: connection refused")
	f(PhaseError{Reason: reasonNoPrefiller}, "prefill: no_prefiller")
}

// TestMetricsStartAtZero and carry no labels but those of closed sets.
func TestMetricsStartAtZero(t *testing.T) {
	r := newRig(t, nil)
	for _, reason := range Reasons() {
		r.want(0, "attempts_total", "prefill", reason)
	}
	families, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(families) != 23 {
		t.Errorf("%d families", len(families))
	}
	for _, f := range families {
		if len(f.GetMetric()) == 0 || f.GetHelp() == "" {
			t.Errorf("%s has no series or no help", f.GetName())
		}
	}
}
