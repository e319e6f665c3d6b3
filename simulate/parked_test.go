// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestClockJump(t *testing.T) {
	jumps := map[string]func(t *testing.T, e *Engine, d time.Duration){
		"method": func(_ *testing.T, e *Engine, d time.Duration) { e.JumpClock(d) },
		"admin": func(t *testing.T, e *Engine, d time.Duration) {
			t.Helper()
			r := post(t, e, "/admin/clock", `{"jump_ms":`+strconv.FormatInt(d.Milliseconds(), 10)+`}`)
			if r.status != http.StatusOK {
				t.Fatalf("status %d: %s", r.status, r.body)
			}
		},
	}
	for name, jump := range jumps {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := pairOptions
			o.Scale, o.Lease = 1, 30*time.Second
			p, d := newPair(t, o)
			h := prefillLeg(t, p, prompt(200, 1), "")
			before := p.Held()[0].Expires
			jump(t, p, -10*time.Second)
			if got := p.Held()[0].Expires.Sub(before); got != 10*time.Second {
				t.Errorf("lease ends %v later", got)
			}
			jump(t, p, 10*time.Second)
			if got := p.Held()[0].Expires; !got.Equal(before) {
				t.Errorf("lease ends at %v, want %v", got, before)
			}
			jump(t, p, 31*time.Second)
			settle(t, p)
			leaks(t, p, 1)
			// Nobody reused the blocks yet.
			if r := post(t, d, "/v1/completions", complete(prompt(200, 1), 1, withHandle(h))); r.status != http.StatusOK || d.Stats().WrongPulls != 0 {
				t.Errorf("decode after the jump: %d, %+v", r.status, d.Stats())
			}
		})
	}
	e := newEngine(t, pairOptions)
	if r := post(t, e, "/admin/clock", `{"jump_ms":"x"}`); r.status != http.StatusBadRequest {
		t.Errorf("not a number: status %d", r.status)
	}
}

func TestPushHandle(t *testing.T) {
	o := pairOptions
	o.Connector = "nixl-push"
	p, d := newPair(t, o)
	h := prefillLeg(t, p, prompt(200, 1), "")
	if strings.Contains(h, "remote_block_ids") || !strings.Contains(h, `"transfer_mode":"push"`) {
		t.Errorf("handle: %s", h)
	}
	if r := post(t, d, "/v1/completions", complete(prompt(200, 1), 1, withHandle(h))); r.status != http.StatusOK || !d.Pulls()[0].Verbatim {
		t.Errorf("status %d, pulls %+v", r.status, d.Pulls())
	}
	leaks(t, p, 0)
}

// TestPushHandleAtAPullingEngine is a pair whose engines were set up differently.
func TestPushHandleAtAPullingEngine(t *testing.T) {
	o := pairOptions
	o.Peers, o.Name, o.Connector = NewRegistry(), "p", "nixl-push"
	p := newEngine(t, o)
	o.Name, o.Connector = "d", ""
	d := newEngine(t, o)
	h := prefillLeg(t, p, prompt(200, 1), "")
	if r := post(t, d, "/v1/completions", complete(prompt(200, 1), 1, withHandle(h))); r.status != http.StatusInternalServerError {
		t.Errorf("status %d", r.status)
	}
	checkDeath(t, d, true)
	leaks(t, p, 1)
}

func TestPushHandleTwice(t *testing.T) {
	o := pairOptions
	o.Connector = "nixl-push"
	short := o
	short.Lease = 10 * time.Second // 100 ms, for the registration that nothing answers
	p, d := newPairOf(t, o, short)
	h := prefillLeg(t, p, prompt(200, 1), "")
	if r := post(t, d, "/v1/completions", complete(prompt(200, 1), 1, withHandle(h))); r.status != http.StatusOK {
		t.Errorf("first: status %d", r.status)
	}
	r := post(t, d, "/v1/completions", complete(prompt(200, 1), 1, `,"cache_salt":"s"`+withHandle(h)))
	if r.status != http.StatusInternalServerError || d.Stats().FailedPulls != 1 {
		t.Errorf("second: status %d, stats %+v", r.status, d.Stats())
	}
}

func TestMoRIIOHandle(t *testing.T) {
	o := pairOptions
	o.Connector = "moriio"
	p, d := newPair(t, o)
	const ask = `,"kv_transfer_params":{"do_remote_decode":true,"transfer_id":"tx-1"}`
	r := post(t, p, "/v1/completions", complete(prompt(200, 1), 1, ask))
	h := transferOf(t, r)
	if h["transfer_id"] != "tx-1" || h["remote_handshake_port"] != float64(p.P2PPort()) || h["remote_notify_port"] == nil || h["remote_port"] != nil || len(h) != 10 {
		t.Errorf("handle: %v", h)
	}
	if got := post(t, d, "/v1/completions", complete(prompt(200, 1), 1, extra(t, h))); got.status != http.StatusOK {
		t.Errorf("decode: status %d", got.status)
	}
	// Stopped, not cut off by the limit: no handle, nothing held.
	stopped := post(t, p, "/v1/completions", complete(prompt(200, 2), 1, `,"stop":["a","e","i","o","u"]`+ask))
	if kv := stopped.json(t)["kv_transfer_params"]; stopped.status != http.StatusOK || kv != nil || len(p.Held()) != 0 {
		t.Errorf("after a stop: %v, held %+v", kv, p.Held())
	}
	if r := post(t, p, "/v1/completions", complete(prompt(64, 3), 1, askHandle)); r.status != http.StatusInternalServerError {
		t.Errorf("without a transfer id: status %d", r.status)
	}
	leaks(t, p, 0)
}

func TestEndpointLabels(t *testing.T) {
	tests := []struct {
		o    Options
		want map[string]string
	}{
		{Options{}, nil},
		{Options{Engine: "vllm", Connector: "nixlv2"}, nil},
		{Options{Connector: "offloading"}, map[string]string{labelP2PPort: "5600"}},
		{Options{Engine: "sglang"}, map[string]string{labelEngineType: "sglang"}},
		{Options{Engine: "trtllm"}, map[string]string{labelEngineType: "trtllm-serve"}},
	}
	for _, tt := range tests {
		e, err := New(tt.o)
		if err != nil {
			t.Fatal(err)
		}
		got := e.Labels()
		if got[labelSidecar] != "false" {
			t.Errorf("%+v: labels %v", tt.o, got)
		}
		for k, v := range tt.want {
			if got[k] != v {
				t.Errorf("%+v: labels %v, want %s=%s", tt.o, got, k, v)
			}
		}
		lines := e.labelLines("  ")
		if !strings.Contains(lines, "  "+labelSidecar+`: "false"`+"\n") {
			t.Errorf("lines: %s", lines)
		}
	}
}

func TestUnknownConnector(t *testing.T) {
	for _, o := range []Options{{Connector: "nixl"}, {Engine: "other"}, {Engine: "trtllm", Connector: "moriio"}} {
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), "--connector") {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestAddMember(t *testing.T) {
	f := func(body, name, value, want string) {
		t.Helper()
		in := []byte(body)
		if got := string(addMember(in, name, []byte(value))); got != want || string(in) != body {
			t.Errorf("%s + %s: %s, want %s", body, name, got, want)
		}
	}
	f(`{"a":1}`, "b", `{"c":2}`, `{"a":1,"b":{"c":2}}`)
	f(`{}`, "b", `2`, `{"b":2}`)
	f(`{"a":1}`, "", `2`, `{"a":1}`)
	f(`{"a":1}`, "b", ``, `{"a":1}`)
}
