// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

const (
	several = `{"model":"m","prompt":"one two three","n":2}`
	echoed  = `{"model":"m","prompt":"one two three","echo":true}`
)

// TestNotCarried: where decode cannot prefill for itself, what its wire cannot carry is refused in words that name the
// property and the connector; what is not ours to judge goes on as it came.
func TestNotCarried(t *testing.T) {
	chat := `{"model":"m","max_tokens":4,"messages":[{"role":"user","content":"one two three"}]}`
	for _, c := range []struct {
		name   string
		api    inference.API
		body   string
		change func(*config.Disaggregation)
		spoil  func(*Job)
		want   string // ends the error; "" = it goes on
	}{
		{name: "several choices", api: inference.Completions, body: several, want: "the connector sglang does not carry n > 1"},
		{name: "echo", api: inference.Completions, body: echoed, want: "the connector sglang does not carry the property echo"},
		{name: "Messages", api: inference.Messages, body: chat, want: "the connector sglang does not carry requests of the API messages"},
		{name: "GET", api: inference.Completions, body: several, spoil: func(j *Job) { j.Request.Method = http.MethodGet }},
		{name: "unknown path", api: inference.Unknown, body: several},
		{name: "a body that was not read", api: inference.Completions, body: several, spoil: func(j *Job) {
			j.Request.Bars, j.Body = j.Request.Bars|inference.BarNotJSON, nil
		}},
		{name: "mode off", api: inference.Completions, body: several, change: func(c *config.Disaggregation) { c.Mode = modeOff }},
		{name: "mode headers", api: inference.Completions, body: several, change: func(c *config.Disaggregation) { c.Mode = modeHeaders }},
		{name: "a sidecar", api: inference.Completions, body: echoed, spoil: func(j *Job) { j.Decode.Sidecar = pool.SidecarPresent }},
		{name: "decode that can prefill", api: inference.Completions, body: several, spoil: func(j *Job) { j.Decode.Role |= pool.RolePrefill }},
		{
			name: "the caller disaggregates", api: inference.Completions, body: `{"model":"m","prompt":"one","n":2,"bootstrap_room":1}`,
			change: func(c *config.Disaggregation) { c.AcceptClientTransferFields = true },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, func(d *config.Disaggregation) {
				d.KVConnector = map[string]string{"": "sglang"}
				if c.change != nil {
					c.change(d)
				}
			})
			p := r.server("p", func(http.ResponseWriter, *http.Request) { t.Error("dialled") })
			j := r.job(c.api, c.body, r.add("d", "decode", "10.9.9.9:8000"), p)
			if c.spoil != nil {
				c.spoil(j)
			}
			out, err := r.Run(t.Context(), j)
			if c.want == "" { // in mode headers a reservation stays
				if err != nil {
					t.Error(err)
				}
				return
			}
			r.idle()
			if !errors.Is(err, ErrNotCarried) || !strings.HasSuffix(err.Error(), ": "+c.want) || out.WayReason != c.want || out.Name != "" {
				t.Errorf("%+v, %v", out, err)
			}
		})
	}
}

// TestWayReason: a request that goes aggregated although the decision wanted a prefill says why.
func TestWayReason(t *testing.T) {
	for _, c := range []struct {
		name      string
		connector map[string]string
		api       inference.API
		body      string
		want      string
	}{
		{"API", map[string]string{"": "trtllm"}, inference.Responses, `{"model":"m","input":"one two"}`, "the connector trtllm does not carry requests of the API responses"},
		{"property", map[string]string{"": "nixlv2"}, inference.Completions, echoed, "the connector nixlv2 does not carry the property echo"},
		{"choices", map[string]string{"": "trtllm"}, inference.Completions, several, "the connector trtllm does not carry n > 1"},
		{"no connector", map[string]string{"sglang": "sglang"}, inference.Completions, clientBody, declinedNoWire + "vllm"},
		{"transfer fields", map[string]string{"": "nixlv2"}, inference.Completions, `{"model":"m","prompt":"one","kv_transfer_params":{}}`, declinedCaller},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, func(d *config.Disaggregation) { d.KVConnector, d.AcceptClientTransferFields = c.connector, true })
			p := r.server("p", func(http.ResponseWriter, *http.Request) { t.Error("dialled") })
			d := r.add("d", "decode", "10.9.9.9:8000")
			d.Engine = "vllm"
			if out := r.run(r.job(c.api, c.body, d, p)); out.Name != "aggregated" || out.WayReason != c.want {
				t.Errorf("%s: %q, want %q", out.Name, out.WayReason, c.want)
			}
		})
	}
	r := newRig(t, nil)
	if out := r.run(r.job(inference.Completions, echoed, r.add("d", "decode", "10.9.9.9:8000"))); out.WayReason != "" {
		t.Errorf("nobody wanted a prefill: %q", out.WayReason)
	}
}

// TestEjectedIsTold: each ejection by sub-requests, once.
func TestEjectedIsTold(t *testing.T) {
	r := newRig(t, func(c *config.Disaggregation) { c.Breaker.Failures = 100 })
	var told []string
	r.ejected = func(e *pool.Endpoint, reason string) { told = append(told, e.Name+" "+reason) }
	p := r.refusing("p")
	for range pool.EjectAfter + 2 {
		r.run(r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.9:8000"), p))
	}
	if strings.Join(told, ", ") != "p refused" {
		t.Errorf("told %v", told)
	}
}

// TestErrorOfAnAttempt is told with it, bounded and valid UTF-8.
func TestErrorOfAnAttempt(t *testing.T) {
	r := newRig(t, nil)
	p := r.refusing("p")
	out := r.run(r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.9:8000"), p))
	if text := out.Attempts[0].Error; !strings.Contains(text, p.Hostport) || !strings.Contains(text, "refused") {
		t.Errorf("%q", text)
	}
	res := result{err: errors.New(strings.Repeat("€", 100))} // three bytes each
	if got := res.errorText(); got != strings.Repeat("€", 66) {
		t.Errorf("%d bytes: %q", len(got), got)
	}
}
