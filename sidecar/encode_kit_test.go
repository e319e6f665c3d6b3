// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// testEncoder is an encoder connector whose bodies say what it was told. Audio cannot be encoded apart.
type testEncoder struct{ panics bool }

func (c testEncoder) Item(x *connectors.Encoding, item int) (inference.Body, bool) {
	m := &x.Request.Media[item]
	var b inference.Body
	b.Append([]byte(`{"model":"` + x.Model + `","key":"` + x.Keys[item] + `","media":`))
	for _, chunk := range x.Request.Body.Slice(m.Span).Chunks {
		b.Append(chunk)
	}
	if x.Request.Body.Len < 8<<20 {
		if shared, _, err := inference.Field(bytes.Join(x.Request.Body.Chunks, nil), "mm_processor_kwargs"); err == nil && len(shared) > 0 {
			b.Append([]byte(`,"mm_processor_kwargs":`))
			b.Append(shared)
		}
	}
	b.Append([]byte(`}`))
	return b, m.Kind != inference.InputAudio
}

func (c testEncoder) Answer(_ *connectors.Encoding, _ int, answer []byte) connectors.Answer {
	if c.panics {
		panic("mistake")
	}
	handle, _, err := inference.Field(answer, "handle")
	switch {
	case err != nil:
		return connectors.Answer{Verdict: connectors.Malformed}
	case len(handle) == 0:
		return connectors.Answer{Verdict: connectors.Missing}
	}
	return connectors.Answer{Handle: bytes.Clone(handle)}
}

func (testEncoder) Splice(x *connectors.Encoding, handles [][]byte, consumer bool, body *inference.Edits) {
	s := make([]string, len(handles))
	for i, h := range handles {
		s[i] = "null"
		if h != nil {
			s[i] = string(h)
		}
	}
	body.Set("ec", fmt.Appendf(nil, `{"lean":%v,"consumer":%v,"handles":[%s]}`, x.Lean, consumer, strings.Join(s, ",")))
}

// spliced is what testEncoder put into a body.
type spliced struct {
	Lean, Consumer bool
	Handles        []string
}

func splicedInto(body string) *spliced {
	var b struct{ EC *spliced }
	_ = json.Unmarshal([]byte(body), &b)
	return b.EC
}

// received is a request that an endpoint got.
type received struct {
	at, path, body string
	header         http.Header
}

// encodeRig is a rig with an encoder connector, whose endpoints write down what they get.
type encodeRig struct {
	*rig
	mu  sync.Mutex
	log []received
}

func newEncodeRig(r *rig) *encodeRig {
	s := *r.settings.Load()
	s.encoder = encoder{testEncoder{}, connectors.EncoderTraits{APIs: []inference.API{inference.Chat}}}
	r.settings.Store(&s)
	return &encodeRig{rig: r}
}

func (r *encodeRig) record(at string, h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body)
		r.mu.Lock()
		r.log = append(r.log, received{at, req.URL.Path, string(body), req.Header})
		r.mu.Unlock()
		req.Body = io.NopCloser(bytes.NewReader(body))
		h(w, req)
	}
}

// got takes what was written down.
func (r *encodeRig) got() []received {
	r.mu.Lock()
	defer r.mu.Unlock()
	log := r.log
	r.log = nil
	return log
}

// encodeServer starts an encode endpoint; nil answers with the name of the endpoint as the handle.
func (r *encodeRig) encodeServer(name string, h http.HandlerFunc) *pool.Endpoint {
	if h == nil {
		h = answer(`{"handle":"` + name + `"}`)
	}
	return as(pool.RoleEncode, r.server(name, r.record(name, h)))
}

// as changes what an endpoint is for, before anybody looks.
func as(role pool.Role, e *pool.Endpoint) *pool.Endpoint {
	e.Role = role
	return e
}

// images is a chat body with an image for each name.
func images(names ...string) string {
	parts := make([]string, len(names))
	for i, name := range names {
		parts[i] = `{"type":"image_url","image_url":{"url":"` + name + `"}}`
	}
	return chat(parts...)
}

func chat(parts ...string) string {
	return `{"model":"tiny","max_tokens":4,"messages":[{"role":"user","content":[{"type":"text","text":"what is this?"},` + strings.Join(parts, ",") + `]}]}`
}

// encodeJob is a chat request whose decision ranks encoders and prefillers.
func (r *encodeRig) encodeJob(body string, decode *pool.Endpoint, encoders, prefillers []*pool.Endpoint) *Job {
	r.t.Helper()
	j := r.job(inference.Chat, body, decode, prefillers...)
	pick := j.Decision.Phase(scheduler.PhaseEncode)
	pick.Run, pick.Wanted = len(encoders) > 0, len(encoders) == 0
	for _, e := range encoders {
		pick.Ranked = append(pick.Ranked, scheduler.Ranked{Endpoint: e})
	}
	return j
}

// modeOf is a change of the configuration.
func modeOf(name string) func(*config.Disaggregation) {
	return func(c *config.Disaggregation) { c.Mode = name }
}

func list(e ...*pool.Endpoint) []*pool.Endpoint { return e }
