// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/simulate"
)

// reset closes the connection instead of answering.
func reset(w http.ResponseWriter, req *http.Request) {
	_, _ = io.Copy(io.Discard, req.Body)
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		_ = conn.Close()
	}
}

// hang answers nothing until the client leaves.
func hang(_ http.ResponseWriter, req *http.Request) {
	_, _ = io.Copy(io.Discard, req.Body)
	<-req.Context().Done()
}

// raw answers with bytes that need be no HTTP.
func raw(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.Copy(io.Discard, req.Body)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			_, _ = io.WriteString(conn, text)
			_ = conn.Close()
		}
	}
}

// slow sends headers and then trickles.
func slow(w http.ResponseWriter, req *http.Request) {
	_, _ = io.Copy(io.Discard, req.Body)
	for {
		if _, err := io.WriteString(w, " "); err != nil || http.NewResponseController(w).Flush() != nil {
			return
		}
		select {
		case <-req.Context().Done():
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

const (
	noHandle   = `{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":70},"kv_transfer_params":null}`
	stopped    = `{"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":70}}`
	incomplete = `{"choices":[{"finish_reason":"length"}],"usage":{"prompt_tokens":70},"kv_transfer_params":{"do_remote_prefill":true}}`
	engineErr  = `{"choices":[{"finish_reason":"error"}]}`
)

// failures is every way in which a prefill can go wrong, and what Baton does about it (docs/design.md 3.5).
func failures() map[string]struct {
	handler http.HandlerFunc // nil: nobody listens
	reason  string
	next    bool // another prefiller is asked
	blame   bool // breaker and health are told
	leaked  string
} {
	type row = struct {
		handler http.HandlerFunc
		reason  string
		next    bool
		blame   bool
		leaked  string
	}
	return map[string]row{
		"refused":             {nil, reasonRefused, true, true, ""},
		"reset":               {reset, reasonReset, true, true, ""},
		"timeout":             {hang, reasonTimeout, true, true, ""},
		"500":                 {status(500), reason5xx, true, true, ""},
		"503":                 {status(503), reason5xx, true, true, ""},
		"no HTTP":             {raw("garbage\r\n\r\n"), reasonMalformed, true, true, ""},
		"no JSON":             {answer("<html>"), reasonMalformed, true, true, ""},
		"truncated JSON":      {answer(goodAnswer[:60]), reasonMalformed, true, true, ""},
		"redirect":            {http.RedirectHandler("http://127.0.0.1:1/", http.StatusFound).ServeHTTP, reasonMalformed, true, true, ""},
		"204":                 {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, reasonMalformed, true, true, ""},
		"error in a 200":      {answer(engineErr), reasonEngineError, true, true, ""},
		"cut after headers":   {raw("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"), reasonReset, true, true, leakAnswerLost},
		"slow body":           {slow, reasonTimeout, true, true, leakAnswerLost},
		"404":                 {status(404), reasonNotFound, true, false, ""},
		"408":                 {status(408), reasonOverloaded, true, false, ""},
		"425":                 {status(425), reasonOverloaded, true, false, ""},
		"429":                 {status(429), reasonOverloaded, true, false, ""},
		"400":                 {status(400), reasonRejected, false, false, ""},
		"422":                 {status(422), reasonRejected, false, false, ""},
		"401":                 {status(401), reasonRejected, false, false, ""},
		"too large":           {answer(strings.Repeat(" ", 5000) + goodAnswer), reasonTooLarge, false, false, reasonTooLarge},
		"no handle":           {answer(noHandle), reasonMissing, false, false, ""},
		"no handle, complete": {answer(stopped), reasonComplete, false, false, ""},
		"handle incomplete":   {answer(incomplete), reasonIncomplete, false, false, reasonIncomplete},
	}
}

// TestFailureThenNext walks on to the second prefiller where that may help, and else lets decode go on alone, once
// (llm-d's decode sidecar, llm-d-router 711 and 712: the sidecar knew one host and could not).
func TestFailureThenNext(t *testing.T) {
	for name, f := range failures() {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(c *config.Disaggregation) {
				if f.reason == reasonTimeout {
					c.Prefill.Timeout = 2 * time.Second
				}
				c.Prefill.MaxResponseBytes = 4096
			})
			var first *pool.Endpoint
			if f.handler == nil {
				first = r.refusing("p1")
			} else {
				first = r.server("p1", f.handler)
			}
			var attempts []string
			second := r.server("p2", func(w http.ResponseWriter, req *http.Request) {
				attempts = append(attempts, req.Header.Get("X-Processor-Attempt")+req.Header.Get("X-Request-Id"))
				if n := second(r).Load.Requests(); n != 1 || first.Load.Requests() != 0 {
					t.Errorf("while the second works: %d reserved there, %d on the first", n, first.Load.Requests())
				}
				answer(goodAnswer)(w, req)
			})
			j := r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.9:8000"), first, second)
			out := r.run(j)
			wantName, wantReasons := "fallback-"+f.reason, f.reason
			if f.next {
				wantName, wantReasons = "disaggregated", f.reason+" ok"
			}
			if out.Name != wantName || reasons(out) != wantReasons || out.HasHandle != f.next {
				t.Fatalf("%s after %s, want %s after %s", out.Name, reasons(out), wantName, wantReasons)
			}
			if f.next && (len(attempts) != 1 || attempts[0] != "2req-1" || out.Prefiller != second || !strings.Contains(decodeBody(j), goodHandle)) {
				t.Errorf("second prefiller saw %v, decode %s", attempts, decodeBody(j))
			}
			if !f.next && decodeBody(j) != clientBody {
				t.Errorf("decode gets %s", decodeBody(j))
			}
			for range pool.EjectAfter - 1 {
				first.Health.Fail(time.Now())
			}
			if blamed := first.Health.Standing(time.Now()) == pool.Ejected; blamed != f.blame {
				t.Errorf("blamed %v, want %v", blamed, f.blame)
			}
			r.want(map[bool]float64{true: 1}[f.next], "retries_total")
			r.want(map[bool]float64{false: 1}[f.next], "fallbacks_total", f.reason)
			r.want(1, "attempts_total", "prefill", f.reason)
			r.want(1, "checkpoints_total", "PREFILL_SELECTED")
			r.want(map[bool]float64{true: 1}[f.next], "checkpoints_total", "PREFILL_COMPLETE")
			leaks := 0.0
			if f.leaked != "" {
				leaks = 1
				r.want(1, "leaked_prefill_total", f.leaked)
				if r.metric("leaked_prefill_tokens_total") == 0 {
					t.Error("no leaked tokens")
				}
			}
			r.want(leaks, "leaked_prefill_total")
		})
	}
}

func second(r *rig) *pool.Endpoint {
	for _, e := range r.all {
		if e.Name == "p2" {
			return e
		}
	}
	return nil
}

// TestAllPrefillersDown is an aggregated answer, or the error where the configuration wants it (clause h).
func TestAllPrefillersDown(t *testing.T) {
	for name, f := range failures() {
		for _, onFailure := range []string{"aggregate", "fail"} {
			t.Run(name+"/"+onFailure, func(t *testing.T) {
				r := newRig(t, func(c *config.Disaggregation) {
					c.OnFailure = onFailure
					if f.reason == reasonTimeout {
						c.Prefill.Timeout = 50 * time.Millisecond
					}
					c.Prefill.MaxResponseBytes = 4096
				})
				add := func(name string) *pool.Endpoint {
					if f.handler == nil {
						return r.refusing(name)
					}
					return r.server(name, f.handler)
				}
				a, b, c := add("p1"), add("p2"), add("p3")
				j := r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.9:8000"), a, b, c)
				out, err := r.Run(t.Context(), j)
				r.idle()
				attempts := 1
				if f.next {
					attempts = 2 // of three ranked, prefill.attempts is 2
				}
				if onFailure == "fail" && f.next {
					e, ok := errors.AsType[*PhaseError](err)
					if !ok || e.Attempt != attempts || e.Reason != f.reason || e.Endpoint != b.Hostport {
						t.Fatalf("error %+v", err)
					}
					if want := "prefill " + b.Hostport + " attempt 2: "; !strings.HasPrefix(e.Error(), want) {
						t.Errorf("%q, want %q", e.Error(), want)
					}
					if e.Status >= 300 && !strings.HasSuffix(e.Error(), "attempt 2: status "+http.StatusText(e.Status)) &&
						!strings.Contains(e.Error(), "status ") {
						t.Errorf("%q names no status", e.Error())
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if out.Name != "fallback-"+f.reason || len(out.Attempts) != attempts || out.HasHandle || decodeBody(j) != clientBody {
					t.Errorf("%s after %s; decode gets %s", out.Name, reasons(out), decodeBody(j))
				}
				r.want(1, "fallbacks_total", f.reason)
			})
		}
	}
}

// TestKilledEngine retries on another engine when the first dies at its work (F58).
func TestKilledEngine(t *testing.T) {
	r, peers := newRig(t, nil), simulate.NewRegistry()
	slowly := func(o *simulate.Options) { o.PrefillFixed = 10 * time.Minute }
	p1, e1 := r.engine("p1", "prefill", peers, slowly)
	_, e2 := r.engine("p2", "prefill", peers, nil)
	_, de := r.engine("d", "decode", peers, nil)
	go func() {
		for len(p1.Held()) == 0 {
			time.Sleep(time.Millisecond)
		}
		p1.Kill()
	}()
	j := r.job(inference.Completions, clientBody, de, e1, e2)
	out := r.run(j)
	if out.Prefiller != e2 || reasons(out) != "reset ok" {
		t.Fatalf("%s after %s", out.Name, reasons(out))
	}
	if code, _ := decode(t, de, j); code != http.StatusOK {
		t.Errorf("decode answers %d", code)
	}
}

// TestNoPrefillerUsable falls back, or fails, without a sub-request when none of those ranked may be asked.
func TestNoPrefillerUsable(t *testing.T) {
	f := func(name, why string, spoil func(*rig, *pool.Endpoint)) {
		t.Helper()
		for _, onFailure := range []string{"aggregate", "fail"} {
			r := newRig(t, func(c *config.Disaggregation) { c.OnFailure = onFailure })
			p := r.server("p", func(http.ResponseWriter, *http.Request) { t.Errorf("%s: dialled", name) })
			j := r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.9:8000"), p)
			spoil(r, p)
			out, err := r.Run(t.Context(), j)
			if p.Load.Requests() != 0 {
				t.Errorf("%s: reservation left", name)
			}
			if want := "none could be tried: " + p.Hostport + " " + why; out.WayReason != want {
				t.Errorf("%s: %q, want %q", name, out.WayReason, want)
			}
			if onFailure == "fail" {
				if e, ok := errors.AsType[*PhaseError](err); !ok || e.Error() != "prefill: no_prefiller" {
					t.Errorf("%s: %v", name, err)
				}
				continue
			}
			if err != nil || out.Name != "fallback-no_prefiller" {
				t.Errorf("%s: %+v, %v", name, out, err)
			}
		}
	}
	f("left the pool", skipGone, func(r *rig, p *pool.Endpoint) { r.drop(p) })
	f("other pod at its address", skipGone, func(r *rig, p *pool.Endpoint) {
		other := *p
		other.UID = "another"
		r.drop(p)
		r.all = append(r.all, &other)
		r.publish()
	})
	f("role changed", skipRole, func(r *rig, p *pool.Endpoint) {
		other := *p
		other.Role = pool.RoleDecode
		r.drop(p)
		r.all = append(r.all, &other)
		r.publish()
	})
	f("not ready", skipNotReady, func(_ *rig, p *pool.Endpoint) { p.Health.SetReady(false) })
	f("other wire", skipWire, func(r *rig, p *pool.Endpoint) {
		p.Engine = "other"
		r.settings.Load().wires["other"] = wire{}
	})
}

// TestNobodyRanked: the decider wanted a prefill and the scheduler found nobody for it, which is the same to the client
// as a ranked list that is used up.
func TestNobodyRanked(t *testing.T) {
	f := func(mode, onFailure string, wanted bool, want string) {
		t.Helper()
		r := newRig(t, func(c *config.Disaggregation) { c.Mode, c.OnFailure = mode, onFailure })
		for _, d := range []*pool.Endpoint{r.add("d", "decode", "10.9.9.9:8000"), nil} {
			j := r.job(inference.Completions, clientBody, d)
			j.Decision.Phase(scheduler.PhasePrefill).Wanted = wanted
			out, err := r.Run(t.Context(), j)
			r.idle()
			if want == "" {
				if e, ok := errors.AsType[*PhaseError](err); !ok || e.Reason != reasonNoPrefiller {
					t.Errorf("%s %s: %+v, %v", mode, onFailure, out, err)
				}
			} else if err != nil || out.Name != want || decodeBody(j) != clientBody {
				t.Errorf("%s %s: %+v, %v", mode, onFailure, out, err)
			}
		}
		r.want(map[bool]float64{true: 2}[want == "fallback-no_prefiller"], "fallbacks_total", "no_prefiller")
	}
	for _, mode := range []string{"auto", "orchestrate", "headers"} {
		f(mode, "aggregate", true, "fallback-no_prefiller")
		f(mode, "fail", true, "")
		f(mode, "fail", false, "aggregated")
	}
	f("off", "aggregate", true, "aggregated")
	f("off", "fail", true, "aggregated")
}

// TestOutcomeBesideError: what was tried is told, too, when nothing may be forwarded.
func TestOutcomeBesideError(t *testing.T) {
	f := func(name string, change func(*config.Disaggregation), leaves bool, handler http.HandlerFunc, want error, reason string) {
		t.Helper()
		r := newRig(t, change)
		ctx, gone := contextGone(t)
		defer gone()
		p := r.server("p", func(w http.ResponseWriter, req *http.Request) {
			if leaves {
				gone()
			}
			handler(w, req)
		})
		out, err := r.Run(ctx, r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.9:8000"), p))
		if _, failed := errors.AsType[*PhaseError](err); want == nil && !failed || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: error %v", name, err)
		}
		if out == nil || out.Name != "" || reasons(out) != reason || out.Checkpoint != PrefillSelected || out.HasHandle || out.Headers != nil {
			t.Errorf("%s: %+v", name, out)
		}
		r.idle()
	}
	f("502", func(c *config.Disaggregation) { c.OnFailure = "fail" }, false, status(503), nil, "status_5xx")
	f("504", func(c *config.Disaggregation) { c.Budget = 100 * time.Millisecond }, false, hang, ErrBudgetSpent, "budget")
	f("client gone", nil, true, hang, context.Canceled, "canceled")
}

// TestPermitsTakenLast: an endpoint that is skipped for another reason keeps the permit of its half-open breaker and the
// probe of its probation.
func TestPermitsTakenLast(t *testing.T) {
	f := func(name string, prepare func(r *rig, sick, d *pool.Endpoint) (decode *pool.Endpoint)) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, func(c *config.Disaggregation) {
					if name == "no retry left" {
						c.RetryBudget = config.RetryBudget{}
					}
				})
				net := r.bubble()
				bad := net.server("bad", status(500))
				sick := net.server("sick", func(http.ResponseWriter, *http.Request) { t.Error("asked") })
				for range max(5, pool.EjectAfter) {
					r.peers.note(sick, false)
					sick.Health.Fail(time.Now())
				}
				time.Sleep(pool.EjectFor + time.Second) // breaker half open, health on probation
				decode := prepare(r, sick, r.add("d", "decode", "10.9.9.9:8000"))
				out := r.run(r.job(inference.Completions, clientBody, decode, bad, sick))
				if len(out.Attempts) != 1 {
					t.Fatalf("%s after %s", out.Name, reasons(out))
				}
				if s := sick.Health.Standing(time.Now()); s != pool.Probation {
					t.Errorf("the probe is spent: %v", s)
				}
				if !r.peers.allow(sick, nil, time.Now()) {
					t.Error("the permit is spent")
				}
			})
		})
	}
	f("it decodes", func(_ *rig, sick, _ *pool.Endpoint) *pool.Endpoint { return sick })
	f("no retry left", func(_ *rig, _, d *pool.Endpoint) *pool.Endpoint { return d })
	f("pair is open", func(r *rig, sick, d *pool.Endpoint) *pool.Endpoint {
		for range 5 {
			r.peers.notePair(sick, d, false)
		}
		return d
	})
}

// TestSkipsSick walks past endpoints that are known to be sick, without a retry.
func TestSkipsSick(t *testing.T) {
	r := newRig(t, nil)
	never := func(http.ResponseWriter, *http.Request) { t.Error("a sick endpoint was asked") }
	a, b, c := r.server("a", never), r.server("b", never), r.server("c", answer(goodAnswer))
	for range 5 {
		r.peers.note(a, false) // open breaker
		b.Health.Fail(time.Now())
	}
	out := r.run(r.job(inference.Completions, clientBody, nil, a, b, c))
	if out.Prefiller != c || out.Attempts[0].Number != 1 {
		t.Errorf("%+v", out)
	}
	r.want(0, "retries_total")
	r.want(1, "breakers", "endpoint", "open")
	r.want(1, "breaker_trips_total", "endpoint")

	// The first choice is the scheduler's: ejected or not, it is asked.
	d := r.server("d", answer(goodAnswer))
	for range 5 {
		d.Health.Fail(time.Now())
	}
	if out := r.run(r.job(inference.Completions, clientBody, nil, d)); out.Prefiller != d {
		t.Errorf("%+v", out)
	}
}

// TestLooped refuses a sub-request that comes back through the gateway (clause i).
func TestLooped(t *testing.T) {
	r := newRig(t, nil)
	p := r.server("p", func(http.ResponseWriter, *http.Request) { t.Error("called") })
	j := r.job(inference.Completions, clientBody, nil, p)
	j.Request.Headers = inference.Headers{{Name: HeaderDepth, Value: "1"}}
	if _, err := r.Run(t.Context(), j); !errors.Is(err, ErrLooped) {
		t.Errorf("error %v", err)
	}
	r.idle()
	r.want(1, "looped_total")
}
