// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// untouched reports whether nothing was put into the decode request.
func untouched(j *Job) bool { return splicedInto(decodeBody(j)) == nil }

// TestEncodeFailures: an item is tried elsewhere, then its raw media stays or the request ends, by configuration.
func TestEncodeFailures(t *testing.T) {
	huge := `{"handle":"` + strings.Repeat("x", 2<<20) + `"}`
	f := func(name string, bad http.HandlerFunc, wantReasons string, wantRaw, wantFail bool, wantBlame bool) {
		t.Helper()
		for _, policy := range []string{"aggregate", "fail"} {
			r := newEncodeRig(newRig(t, func(c *config.Disaggregation) { c.OnFailure = policy }))
			encoders := list(r.encodeServer("e0", bad), r.encodeServer("e1", bad), r.encodeServer("e2", bad))
			p := r.server("p", r.record("p", answer(goodAnswer)))
			j := r.encodeJob(images("a"), r.add("d", "decode", "10.9.9.9:8000"), encoders, list(p))
			out, err := r.Run(t.Context(), j)
			r.idle()
			failed := false
			if pe, ok := errors.AsType[*PhaseError](err); ok {
				failed = pe.Phase == scheduler.PhaseEncode && pe.Attempt == len(strings.Fields(wantReasons)) && pe.Endpoint != "" &&
					strings.HasPrefix(pe.Error(), "encode ")
			}
			if want := wantFail && policy == "fail"; failed != want || (err != nil) != want {
				t.Errorf("%s, %s: %v", name, policy, err)
				continue
			}
			want := wantReasons
			if err == nil {
				want += " ok" // of the prefill
				if out.Name != outcomeDisaggregated || untouched(j) != wantRaw {
					t.Errorf("%s, %s: %s with %s", name, policy, out.Name, decodeBody(j))
				}
			}
			if got := reasons(out); got != want {
				t.Errorf("%s, %s: %s, want %s", name, policy, got, want)
			}
			r.want(1, "encode_items_total", itemFailed)
			r.want(0, "checkpoints_total", "ENCODE_COMPLETE")
			for _, e := range encoders {
				if want, got := wantBlame && attempted(out, e) > 0, blamed(e); got != want {
					t.Errorf("%s: %s blamed %v, want %v", name, e.Name, got, want)
				}
			}
		}
	}
	f("5xx", status(500), "status_5xx status_5xx", true, true, true)
	f("no such model", status(404), "not_found not_found", true, true, false)
	f("busy", status(429), "overloaded overloaded", true, true, false)
	f("the item is at fault", status(400), "rejected", true, false, false)
	f("not to be processed", status(422), "rejected", true, false, false)
	f("no JSON", answer(`{"handle":`), "malformed malformed", true, true, true)
	f("another JSON", answer(`[]`), "malformed malformed", true, true, true)
	f("no handle", answer(`{}`), "handle_missing", true, false, false)
	f("huge", answer(huge), "too_large", true, false, false)
	f("a redirect", func(w http.ResponseWriter, req *http.Request) {
		http.Redirect(w, req, "http://127.0.0.1:1/", http.StatusFound)
	}, "malformed malformed", true, true, true)
	f("cut off", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = io.WriteString(w, `{"handle":`)
	}, "reset reset", true, true, true)
}

// blamed reports whether a failure of e was noted, and wears its health out.
func blamed(e *pool.Endpoint) bool {
	n := 1
	for !e.Health.Fail(time.Now()) {
		n++
	}
	return n < pool.EjectAfter
}

// attempted counts the attempts at e.
func attempted(out *Outcome, e *pool.Endpoint) int {
	n := 0
	for i := range out.Attempts {
		if out.Attempts[i].Endpoint == e {
			n++
		}
	}
	return n
}

// TestEncodeElsewhere: one sick endpoint costs its items one more attempt each, and nothing else.
func TestEncodeElsewhere(t *testing.T) {
	r := newEncodeRig(newRig(t, nil))
	good := r.encodeServer("good", nil)
	gone := as(pool.RoleEncode, r.refusing("gone"))
	const items = 24 // each begins at one or the other by its hash and theirs, which no test can know
	var names []string
	for i := range items {
		names = append(names, fmt.Sprint("image-", i))
	}
	j := r.encodeJob(images(names...), r.add("d", "decode", "10.9.9.9:8000"), list(gone, good), nil)
	out := r.run(j)
	s := splicedInto(decodeBody(j))
	if s == nil || strings.Join(s.Handles, " ") != strings.TrimSpace(strings.Repeat("good ", items)) || len(out.Encoders) != 1 || out.Encoders[0] != good {
		t.Errorf("%+v, encoders %s", s, out.encoderHosts())
	}
	if refused := attempted(out, gone); refused == 0 || len(out.Attempts) != items+refused {
		t.Errorf("%s", reasons(out))
	}
	r.want(float64(attempted(out, gone)), "retries_total")
	r.want(items, "encode_items_total", itemEncoded)
}

// TestEncodeSkipsUnfit: endpoints that left, changed, are sick or speak otherwise are not asked.
func TestEncodeSkipsUnfit(t *testing.T) {
	f := func(name string, spoil func(*encodeRig, *pool.Endpoint)) {
		t.Helper()
		r := newEncodeRig(newRig(t, nil))
		e := r.encodeServer("e", nil)
		j := r.encodeJob(images("a"), r.add("d", "decode", "10.9.9.9:8000"), list(e), nil)
		spoil(r, e)
		out := r.run(j)
		if legs := r.got(); len(legs) > 0 || !untouched(j) || len(out.Encoders) > 0 {
			t.Errorf("%s: asked", name)
		}
		r.want(1, "encode_items_total", itemFailed)
	}
	f("left", func(r *encodeRig, e *pool.Endpoint) { r.drop(e) })
	f("another pod", func(r *encodeRig, e *pool.Endpoint) {
		other := *e
		other.UID = "uid-new"
		r.drop(e)
		r.all = append(r.all, &other)
		r.publish()
	})
	f("another role", func(_ *encodeRig, e *pool.Endpoint) { e.Role = pool.RolePrefill })
	f("another engine", func(_ *encodeRig, e *pool.Endpoint) { e.Engine = "sglang" })
	f("down", func(_ *encodeRig, e *pool.Endpoint) { e.Health.SetReady(false) })
	f("breaker open", func(r *encodeRig, e *pool.Endpoint) {
		for range r.settings.Load().Breaker.Failures {
			r.peers.note(e, false)
		}
	})
}

// TestEncodeNobody: a pool without encoders serves media as before, unless it must not.
func TestEncodeNobody(t *testing.T) {
	for _, policy := range []string{"aggregate", "fail"} {
		r := newEncodeRig(newRig(t, func(c *config.Disaggregation) { c.OnFailure = policy }))
		j := r.encodeJob(images("a"), r.add("d", "decode", "10.9.9.9:8000"), nil, nil)
		out, err := r.Run(t.Context(), j)
		pe, failed := errors.AsType[*PhaseError](err)
		if failed != (policy == "fail") || failed && (pe.Reason != reasonNoEncoder || out.Name != "") || !failed && (err != nil || out.Name != outcomeAggregated) {
			t.Errorf("%s: %q, %v", policy, out.Name, err)
		}
	}
}

// TestEncodeClientLeaves cancels every leg at once.
func TestEncodeClientLeaves(t *testing.T) {
	r := newEncodeRig(newRig(t, nil))
	var working atomic.Int32
	e := r.encodeServer("e", func(_ http.ResponseWriter, req *http.Request) {
		working.Add(1)
		<-req.Context().Done()
		working.Add(-1)
	})
	j := r.encodeJob(images("a", "b", "c", "d"), r.add("d", "decode", "10.9.9.9:8000"), list(e), nil)
	ctx, leave := contextGone(t)
	ended := make(chan error)
	go func() {
		_, err := r.Run(ctx, j)
		ended <- err
	}()
	eventually(t, "four legs", func() bool { return working.Load() == 4 })
	leave()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	eventually(t, "no leg", func() bool { return working.Load() == 0 })
	r.idle()
	r.want(4, "attempts_total", "encode", reasonCanceled)
	if blamed(e) {
		t.Error("the endpoint is blamed for a client that left")
	}
}

// TestEncodeBudget: the phase ends with the budget, each attempt with its own timeout.
func TestEncodeBudget(t *testing.T) {
	f := func(name string, timeout time.Duration, wantErr error, want time.Duration, wantReasons string) {
		t.Helper()
		synctest.Test(t, func(t *testing.T) {
			r := newEncodeRig(newRig(t, func(c *config.Disaggregation) { c.Budget, c.Encode.Timeout = 50*time.Second, timeout }))
			net := r.bubble()
			e0, e1 := as(pool.RoleEncode, net.server("e0", hang)), as(pool.RoleEncode, net.server("e1", hang))
			j := r.encodeJob(images("a"), r.add("d", "decode", "10.9.9.9:8000"), list(e0, e1), nil)
			start := time.Now()
			j.Start = start
			out, err := r.Run(t.Context(), j)
			if took := time.Since(start); !errors.Is(err, wantErr) || took != want || reasons(out) != wantReasons {
				t.Errorf("%s: %v after %v: %s", name, err, took, reasons(out))
			}
			r.idle()
			synctest.Wait()
		})
	}
	f("timeouts", 10*time.Second, nil, 20*time.Second, "timeout timeout")
	f("budget", 30*time.Second, ErrBudgetSpent, 50*time.Second, "timeout budget")
}

// TestEncodeMany: of 4,096 different items 256 are sent; the raw media of the others stays.
func TestEncodeMany(t *testing.T) {
	r := newEncodeRig(newRig(t, nil))
	e := r.encodeServer("e", nil)
	names := make([]string, 4096)
	for i := range names {
		names[i] = fmt.Sprintf("u%d", i)
	}
	j := r.encodeJob(images(names...), r.add("d", "decode", "10.9.9.9:8000"), list(e), nil)
	out := r.run(j)
	s := splicedInto(decodeBody(j))
	if got := len(r.got()); got != maxEncoded || len(s.Handles) != len(names) || s.Handles[255] == "" || s.Handles[256] != "" {
		t.Errorf("%d items sent", got)
	}
	if len(out.Attempts) != encodeAttempts {
		t.Errorf("%d attempts recorded", len(out.Attempts))
	}
	r.want(maxEncoded, "encode_items_total", itemEncoded)
	r.want(4096-maxEncoded, "encode_items_total", itemSkipped)
}

// TestEncodeSendsNoMore: what items share cannot be used to multiply a request, and what cannot be sent alone is not sent.
func TestEncodeSendsNoMore(t *testing.T) {
	r := newEncodeRig(newRig(t, nil))
	e := r.encodeServer("e", nil)
	names := make([]string, 100)
	for i := range names {
		names[i] = fmt.Sprintf("u%d", i)
	}
	shared := `{"model":"tiny","mm_processor_kwargs":{"x":"` + strings.Repeat("x", 1<<20) + `"},"messages":`
	body := shared + strings.TrimPrefix(images(names...), `{"model":"tiny","max_tokens":4,"messages":`)
	j := r.encodeJob(body, r.add("d", "decode", "10.9.9.9:8000"), list(e), nil)
	r.run(j)
	if sent := r.metric("sent_bytes_total", "encode"); sent == 0 || sent > float64(2*len(body)+len(names)*itemBytes) {
		t.Errorf("%v bytes sent for a body of %d", sent, len(body))
	}
	if r.metric("encode_items_total", itemSkipped)+r.metric("encode_items_total", itemEncoded) != 100 {
		t.Error("items are missing")
	}

	r = newEncodeRig(newRig(t, nil))
	e = r.encodeServer("e", nil)
	r.run(r.encodeJob(chat(`{"type":"input_audio","input_audio":{"data":"d"}}`), r.add("d", "decode", "10.9.9.9:8000"), list(e), nil))
	r.want(1, "encode_items_total", itemSkipped)
	if len(r.got()) > 0 {
		t.Error("audio was sent")
	}
}

// TestEncodeHandlesBounded: all handles of a request together are at most as long as one answer may be.
func TestEncodeHandlesBounded(t *testing.T) {
	r := newEncodeRig(newRig(t, func(c *config.Disaggregation) { c.Prefill.MaxResponseBytes = 10_000 }))
	e := r.encodeServer("e", answer(`{"handle":"`+strings.Repeat("x", 4000)+`"}`))
	j := r.encodeJob(images("a", "b", "c", "d"), r.add("d", "decode", "10.9.9.9:8000"), list(e), nil)
	r.run(j)
	r.want(2, "encode_items_total", itemEncoded)
	r.want(2, "attempts_total", "encode", reasonTooLarge)
	if n := len(decodeBody(j)); n > 10_000 {
		t.Errorf("decode body of %d bytes", n)
	}
}

// TestEncodeLean: raw media is given up for the first consumer only, and for none when the handles are old.
func TestEncodeLean(t *testing.T) {
	lean := func(c *config.Disaggregation) { c.Encode.Embeds = "lean" }
	consumed := func(t *testing.T, change func(*config.Disaggregation), prefills ...http.HandlerFunc) (legs []*spliced, decoded *spliced) {
		t.Helper()
		r := newEncodeRig(newRig(t, change))
		var prefillers []*pool.Endpoint
		for i, h := range prefills {
			prefillers = append(prefillers, r.server(fmt.Sprintf("p%d", i), r.record("p", h)))
		}
		j := r.encodeJob(images("a"), r.add("d", "decode", "10.9.9.9:8000"), list(r.encodeServer("e", nil)), prefillers)
		r.run(j)
		for _, leg := range r.got() {
			if leg.at == "p" {
				legs = append(legs, splicedInto(leg.body))
			}
		}
		return legs, splicedInto(decodeBody(j))
	}
	legs, decoded := consumed(t, lean, answer(goodAnswer))
	if len(legs) != 1 || !legs[0].Lean || !legs[0].Consumer || !decoded.Lean || decoded.Consumer {
		t.Errorf("prefill %+v, decode %+v", legs, decoded)
	}
	legs, decoded = consumed(t, lean, status(500), answer(goodAnswer))
	if len(legs) != 2 || !legs[0].Lean || legs[1].Lean || !legs[1].Consumer || decoded.Lean || decoded.Consumer {
		t.Errorf("second prefill %+v, decode %+v", legs, decoded)
	}
	legs, decoded = consumed(t, lean, status(500), status(500))
	if len(legs) != 2 || decoded == nil || decoded.Lean || !decoded.Consumer {
		t.Errorf("decode alone after two prefills: %+v", decoded)
	}
	_, decoded = consumed(t, lean)
	if !decoded.Lean || !decoded.Consumer {
		t.Errorf("decode without prefill: %+v", decoded)
	}
	several := newEncodeRig(newRig(t, lean))
	j := several.encodeJob(images("a"), several.add("d", "decode", "10.9.9.9:8000"), list(several.encodeServer("e", nil)), nil)
	j.Decision.Phase(scheduler.PhaseDecode).Send = 2
	several.run(j)
	if s := splicedInto(decodeBody(j)); s == nil || s.Lean {
		t.Errorf("with decode endpoints to choose from: %+v", s)
	}
	legs, _ = consumed(t, nil, answer(goodAnswer))
	if legs[0].Lean {
		t.Errorf("safe: %+v", legs[0])
	}
}

// TestEncodeLease: a handle whose encoder may have dropped it is left out.
func TestEncodeLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newEncodeRig(newRig(t, func(c *config.Disaggregation) { c.Prefill.Attempts = 2 }))
		net := r.bubble()
		e := as(pool.RoleEncode, net.server("e", answer(`{"handle":"h"}`)))
		slow := net.server("slow", func(w http.ResponseWriter, req *http.Request) {
			time.Sleep(30 * time.Second)
			status(503)(w, req)
		})
		p := net.server("p", r.record("p", answer(goodAnswer)))
		j := r.encodeJob(images("a"), r.add("d", "decode", "10.9.9.9:8000"), list(e), list(slow, p))
		r.run(j)
		legs := r.got()
		if s := splicedInto(legs[0].body); len(legs) != 1 || s == nil || s.Handles[0] != "" {
			t.Errorf("%+v after 30 s", s)
		}
	})
}

// TestEncodePanic: a mistake in a connector reaches whoever guards the stream's goroutine, and nothing is left running.
func TestEncodePanic(t *testing.T) {
	r := newEncodeRig(newRig(t, nil))
	s := *r.settings.Load()
	s.encoder = encoder{testEncoder{panics: true}, connectors.EncoderTraits{APIs: []inference.API{inference.Chat}}}
	r.settings.Store(&s)
	j := r.encodeJob(images("a", "b", "c"), r.add("d", "decode", "10.9.9.9:8000"), list(r.encodeServer("e", nil)), nil)
	func() {
		defer func() {
			if p := recover(); p == nil || !strings.Contains(fmt.Sprint(p), "mistake") {
				t.Errorf("panic %v", p)
			}
		}()
		_, _ = r.Run(t.Context(), j)
	}()
	r.idle()
}

// TestEncodeKeepsNoBodies: items are sent from the client's bytes.
func TestEncodeKeepsNoBodies(t *testing.T) {
	const size = 32 << 20
	r := newEncodeRig(newRig(t, nil))
	e := as(pool.RoleEncode, r.server("e", answer(`{"handle":"h"}`)))
	j := r.encodeJob(images(strings.Repeat("a", size), strings.Repeat("b", size)), r.add("d", "decode", "10.9.9.9:8000"), list(e), nil)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r.run(j)
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > size/2 {
		t.Errorf("%d bytes allocated for two images of %d", grown, size)
	}
}
