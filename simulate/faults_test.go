// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

func setFaults(t *testing.T, e *Engine, f Faults) {
	t.Helper()
	if err := e.SetFaults(f); err != nil {
		t.Fatal(err)
	}
}

// TestFaults injects every kind into a whole answer and into a stream.
func TestFaults(t *testing.T) {
	cut := func(r reply, err error) bool {
		return errors.Is(err, syscall.ECONNRESET) || errors.Is(r.err, syscall.ECONNRESET)
	}
	hangs := func(r reply, err error) bool { return r.status == 0 && errors.Is(err, context.Canceled) }
	hangsInside := func(r reply, err error) bool {
		return err == nil && errors.Is(r.err, context.Canceled) && len(r.body) > 0
	}
	fine := func(r reply, err error) bool { return err == nil && r.err == nil && r.status == http.StatusOK }
	tests := []struct {
		fault         Fault
		whole, stream func(r reply, err error) bool
	}{
		{Fault{Kind: faultResetBefore}, cut, cut},
		{Fault{Kind: faultResetBefore, Late: true}, cut, cut},
		{Fault{Kind: faultResetAfter}, cut, cut},
		{Fault{Kind: faultResetMid, After: 3}, cut, func(r reply, err error) bool {
			return err == nil && errors.Is(r.err, syscall.ECONNRESET) && strings.Count(string(r.body), "data: ") <= 3
		}},
		{Fault{Kind: faultHang}, hangs, hangs},
		{Fault{Kind: faultHangMid, After: 2}, hangsInside, hangsInside},
		{Fault{Kind: faultDelay, DelayMS: 1}, fine, fine},
		{Fault{Kind: faultSlow, BytesPerSecond: 100000}, fine, fine},
		{Fault{Kind: faultStatus, Status: 429, RetryAfter: "7", Body: "no"}, func(r reply, _ error) bool {
			return r.status == 429 && r.header.Get("Retry-After") == "7" && string(r.body) == "no"
		}, func(r reply, _ error) bool { return r.status == 429 }},
		{Fault{Kind: faultStatus}, func(r reply, _ error) bool {
			return r.status == 503 && strings.Contains(string(r.body), `"type":"ServiceUnavailableError"`)
		}, func(r reply, _ error) bool { return r.status == 503 }},
		{Fault{Kind: faultMalformed}, func(r reply, _ error) bool { return r.status == 200 && !json.Valid(r.body) }, fine},
		{Fault{Kind: faultTruncated}, func(r reply, _ error) bool { return r.err == nil && !json.Valid(r.body) }, fine},
		{Fault{Kind: faultHuge, Size: 3 << 20}, func(r reply, _ error) bool { return json.Valid(r.body) && len(r.body) > 3<<20 }, fine},
		{
			Fault{Kind: faultContentType},
			func(r reply, _ error) bool { return strings.HasPrefix(r.header.Get("Content-Type"), "text/html") },
			func(r reply, _ error) bool { return strings.HasPrefix(r.header.Get("Content-Type"), "text/html") },
		},
		{Fault{Kind: faultTruncatedSSE, After: 2}, fine, func(r reply, err error) bool {
			return fine(r, err) && !strings.HasSuffix(string(r.body), "\n\n")
		}},
		{Fault{Kind: faultSplitSSE}, fine, func(r reply, err error) bool {
			return fine(r, err) && strings.HasSuffix(string(r.body), "data: [DONE]\n\n")
		}},
		{
			Fault{Kind: faultFinishError},
			func(r reply, _ error) bool { return strings.Contains(string(r.body), `"finish_reason":"error"`) },
			func(r reply, _ error) bool { return strings.Contains(string(r.body), `"finish_reason":"error"`) },
		},
	}
	for _, tt := range tests {
		t.Run(tt.fault.Kind, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t, Options{Seed: 3})
			for _, stream := range []bool{false, true} {
				tt.fault.Next = 1
				setFaults(t, e, Faults{Rules: []Fault{tt.fault}})
				extra, check := "", tt.whole
				if stream {
					extra, check = `,"stream":true`, tt.stream
				}
				r, err := sendToFaulty(t, e, tt.fault.Kind, complete(prompt(20, 1), 10, extra))
				if !check(r, err) {
					t.Errorf("stream %v: status %d, %v, %v, body %.300q", stream, r.status, err, r.err, r.body)
				}
				if r = post(t, e, "/v1/completions", complete(prompt(20, 1), 10, extra)); !fine(r, nil) {
					t.Errorf("stream %v, without the fault: %d", stream, r.status)
				}
			}
			if n := e.Stats().Injected; n != 2 {
				t.Errorf("injected %d", n)
			}
		})
	}
}

// sendToFaulty is send with a client that leaves an answer that hangs: 300 ms after the fault, or after the first byte of
// the body where there is one.
func sendToFaulty(t *testing.T, e *Engine, kind, body string) (reply, error) {
	t.Helper()
	const wait = 300 * time.Millisecond
	url := e.URL() + "/v1/completions"
	if kind == faultHang {
		before := e.Stats().Injected
		answer, leave := begin(t, e, body)
		eventually(t, "the fault", func() bool { return e.Stats().Injected > before })
		defer time.AfterFunc(wait, leave).Stop()
		r := <-answer
		return r, r.err
	}
	if kind != faultHangMid {
		return send(t.Context(), t, http.MethodPost, url, body)
	}
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := newClient(t).Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	r := reply{status: resp.StatusCode, header: resp.Header, body: make([]byte, 1)}
	if _, r.err = io.ReadFull(resp.Body, r.body); r.err != nil {
		return r, nil
	}
	defer time.AfterFunc(wait, leave).Stop()
	rest, err := io.ReadAll(resp.Body)
	r.body, r.err = append(r.body, rest...), err
	return r, nil
}

func TestFaultDieAndRefuse(t *testing.T) {
	e := newEngine(t, Options{})
	setFaults(t, e, Faults{Rules: []Fault{{Kind: faultDie}}})
	if _, err := send(t.Context(), t, http.MethodPost, e.URL()+"/v1/completions", complete(`"x"`, 1, "")); err == nil {
		t.Error("answered")
	}
	setFaults(t, e, Faults{})
	checkDeath(t, e, true)
	setFaults(t, e, Faults{Refuse: true})
	if _, err := send(t.Context(), t, http.MethodGet, e.URL()+"/health", ""); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("refusing: %v", err)
	}
	setFaults(t, e, Faults{})
	if r := get(t, e, "/health"); r.status != http.StatusOK {
		t.Errorf("no longer refusing: %d", r.status)
	}
}

func TestFaultSelection(t *testing.T) {
	p, d := newPair(t, pairOptions)
	failing := func(e *Engine, body string, header ...string) bool {
		return post(t, e, "/v1/completions", body, header...).status != http.StatusOK
	}
	setFaults(t, p, Faults{Rules: []Fault{{Kind: faultStatus, Phase: phasePrefill, Status: 500, Next: 2}}})
	plain := complete(prompt(40, 1), 1, "")
	leg := complete(prompt(40, 1), 1, askHandle)
	if failing(p, plain) || !failing(p, leg) || !failing(p, leg) || failing(p, leg) {
		t.Error("phase and next")
	}
	setFaults(t, p, Faults{Rules: []Fault{{Kind: faultStatus, Phase: phaseDecode, Attempt: "2"}}})
	if failing(p, plain) || !failing(p, plain, "X-Processor-Attempt", "2") || failing(p, leg, "X-Processor-Attempt", "2") {
		t.Error("attempt")
	}
	setFaults(t, d, Faults{Rules: []Fault{{Kind: faultStatus, RequestID: "a"}, {Kind: faultStatus, Status: 418, RequestID: "b"}}})
	if failing(d, plain) || !failing(d, plain, "X-Request-Id", "a") || !failing(d, plain, "X-Request-Id", "b") {
		t.Error("request id")
	}
	setFaults(t, d, Faults{Rules: []Fault{{Kind: faultStatus, Probability: 0.5}}})
	failed := 0
	for range 60 {
		if failing(d, plain) {
			failed++
		}
	}
	if failed < 10 || failed > 50 {
		t.Errorf("probability 0.5: %d of 60", failed)
	}
}

func TestHandleFaults(t *testing.T) {
	p, d := newPair(t, pairOptions)
	setFaults(t, p, Faults{Rules: []Fault{{Kind: faultOddHandle, Next: 1}, {Kind: faultNoHandle, Next: 1}}})
	odd := prefillLeg(t, p, prompt(200, 1), "")
	if !strings.Contains(odd, `"zz_big":123456789012345678901234567890,"zz_escapes":"\u0041`) {
		t.Fatalf("handle: %s", odd)
	}
	if r := post(t, d, "/v1/completions", complete(prompt(200, 1), 3, withHandle(odd))); r.status != http.StatusOK {
		t.Errorf("odd handle: %d", r.status)
	}
	if pulls := d.Pulls(); len(pulls) != 1 || !pulls[0].Verbatim || pulls[0].Wrong {
		t.Errorf("pulls: %+v", pulls)
	}
	if h := prefillLeg(t, p, prompt(200, 2), ""); h != "null" {
		t.Errorf("handle: %s", h)
	}
	leaks(t, p, 1)
	if l := p.Leaked(); len(l) != 1 || !strings.Contains(l[0].Reason, "withheld") {
		t.Errorf("leaks: %+v", l)
	}
	// A handle that was decoded and encoded again is not the one given out.
	h := edited(t, prefillLeg(t, p, prompt(200, 3), ""), nil)
	post(t, d, "/v1/completions", complete(prompt(200, 3), 3, withHandle(h)))
	if pulls := d.Pulls(); pulls[len(pulls)-1].Verbatim {
		t.Error("a changed handle counts as verbatim")
	}
}

func TestLateFaultLeavesALease(t *testing.T) {
	p := newEngine(t, pairOptions)
	setFaults(t, p, Faults{Rules: []Fault{{Kind: faultResetBefore, Late: true}}})
	if _, err := send(t.Context(), t, http.MethodPost, p.URL()+"/v1/completions", complete(prompt(64, 1), 1, askHandle)); err == nil {
		t.Error("answered")
	}
	if len(p.Held()) != 1 {
		t.Errorf("held: %+v", p.Held())
	}
	leaks(t, p, 1)
}

func TestAdmin(t *testing.T) {
	p, d := newPair(t, pairOptions)
	if r := post(t, p, "/admin/faults", `{"rules":[{"kind":"status","status":500,"next":1}]}`); r.status != http.StatusOK {
		t.Fatalf("%s", r.body)
	}
	if r := post(t, p, "/v1/completions", complete(`"x"`, 1, "")); r.status != http.StatusInternalServerError {
		t.Errorf("fault by admin: %d", r.status)
	}
	for _, bad := range []string{`{"rules":[{"kind":"x"}]}`, `{"zz":1}`, `{`, `{"rules":[{"kind":"hang","probability":2}]}`, `{"rules":[{"kind":"hang","phase":"x"}]}`} {
		if r := post(t, p, "/admin/faults", bad); r.status != http.StatusBadRequest {
			t.Errorf("%s: %d", bad, r.status)
		}
	}
	h := prefillLeg(t, p, prompt(200, 1), "")
	var s State
	state := func(e *Engine) State {
		s = State{}
		if err := json.Unmarshal(get(t, e, "/admin/state").body, &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := state(p); s.HeldBlocks != 7 || s.Leases != 1 || len(s.Holds) != 1 || s.Name != "p" || s.Role != "prefill" {
		t.Errorf("state of p: %+v", s)
	}
	post(t, d, "/v1/completions", complete(prompt(200, 1), 3, withHandle(h)))
	if s := state(d); s.Pulls != 1 || s.PulledTokens != 200 || s.Leaked != 0 || len(s.PullList) != 1 || s.RemoteTokens != 200 {
		t.Errorf("state of d: %+v", s)
	}
	if s := state(p); s.HeldBlocks != 0 || s.Leaked != 0 {
		t.Errorf("state of p: %+v", s)
	}
	if r := get(t, p, "/admin/faults"); !strings.Contains(string(r.body), `"kind":"status"`) {
		t.Errorf("faults: %s", r.body)
	}
}

func TestParseFault(t *testing.T) {
	f, err := ParseFault("kind=status,phase=prefill,status=429,next=2,probability=0.5,late,retry_after=1,body=x")
	want := Fault{Kind: "status", Phase: "prefill", Status: 429, Next: 2, Probability: 0.5, Late: true, RetryAfter: "1", Body: "x"}
	if err != nil || f != want {
		t.Errorf("%+v, %v", f, err)
	}
	for _, bad := range []string{"", "kind=x", "kind=hang,zz=1", "kind=hang,next=x", "kind=hang,phase=x"} {
		if _, err := ParseFault(bad); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

func TestMetricsFaults(t *testing.T) {
	e := newEngine(t, Options{})
	page := func() string { return string(get(t, e, "/metrics").body) }
	setFaults(t, e, Faults{Metrics: metricsFrozen})
	before := page()
	post(t, e, "/v1/completions", complete(`"x"`, 3, ""))
	if page() != before {
		t.Error("frozen page changed")
	}
	setFaults(t, e, Faults{Metrics: metricsNaN})
	if v := metric(t, e, "vllm:num_requests_running"); v != "NaN" {
		t.Errorf("running: %s", v)
	}
	setFaults(t, e, Faults{Metrics: metricsMissing})
	if p := page(); strings.Contains(p, "num_requests_running") || !strings.Contains(p, "vllm:prompt_tokens_total") {
		t.Error("gauges not missing")
	}
	setFaults(t, e, Faults{Metrics: metricsServerError})
	if r := get(t, e, "/metrics"); r.status != http.StatusInternalServerError {
		t.Errorf("status %d", r.status)
	}
	setFaults(t, e, Faults{Metrics: metricsHang})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := send(ctx, t, http.MethodGet, e.URL()+"/metrics", ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hanging: %v", err)
	}
	setFaults(t, e, Faults{})
	if page() == before {
		t.Error("still frozen")
	}
}

func TestAdminKill(t *testing.T) {
	e := newEngine(t, Options{})
	id := e.ID()
	if r := post(t, e, "/admin/kill", `{"restart_after_ms":20}`); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
	eventually(t, "restarted", func() bool { return e.Alive() && e.ID() != id })
	post(t, e, "/admin/kill", `{"restart_after_ms":3600000}`)
	eventually(t, "dead", func() bool { return !e.Alive() })
}
