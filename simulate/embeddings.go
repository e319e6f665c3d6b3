// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"math"
	"net/http"
	"time"
)

// embeddingSize is the length of an embedding whose request asks for no other.
const embeddingSize = 16

type embeddingUsage struct {
	Prompt     int  `json:"prompt_tokens"`
	Total      int  `json:"total_tokens"`
	Completion int  `json:"completion_tokens"`
	Details    null `json:"prompt_tokens_details"`
}

type embedding struct {
	Index     int             `json:"index"`
	Object    string          `json:"object"`
	Embedding json.RawMessage `json:"embedding"`
}

type embeddingList struct {
	ID      string         `json:"id"`
	Object  string         `json:"object"`
	Created int64          `json:"created"`
	Model   string         `json:"model"`
	Data    []embedding    `json:"data"`
	Usage   embeddingUsage `json:"usage"`
}

// serveEmbeddings answers as an embedding model does: a prefill of each input, and vectors made up from its tokens. The
// servers of other models have no such route.
func (p *process) serveEmbeddings(x *exchange) {
	if !p.e.opts.Embeddings {
		x.json(http.StatusNotFound, []byte(`{"detail":"Not Found"}`))
		return
	}
	body, ok := x.readBody()
	if !ok {
		return
	}
	f, bad := readObject(body)
	var c *call
	if bad == nil {
		c, bad = p.e.parseEmbeddings(x.r.Header, f)
	}
	if done := p.received(x, c, body); done {
		return
	}
	if bad != nil {
		x.fail(bad)
		return
	}
	size := embeddingSize
	if n, ok := f.integer("dimensions"); ok && n > 0 && n <= 1<<14 {
		size = n
	}
	c.fields = nil
	g := p.newGroup(c)
	g.fault = x.fault
	if err := p.run(x.r.Context(), c, g, func(*sequence, uint32, string) error { return nil }); err != nil {
		p.answerError(x, newWriter(p, x, g), err)
		return
	}
	if _, err := p.finish(x, g); err != nil || x.fault != nil && x.fault.Late && p.injectEarly(x) {
		return
	}
	list := embeddingList{ID: "embd-" + c.id[len("cmpl-"):], Object: "list", Created: c.created, Model: c.model}
	for i, q := range g.seqs {
		list.Data = append(list.Data, embedding{i, "embedding", vector(mix(q.seed), size, f.text("encoding_format") == "base64")})
	}
	list.Usage.Prompt = c.promptTokens()
	list.Usage.Total = list.Usage.Prompt
	x.answerJSON(marshal(list))
}

// parseEmbeddings reads the input as a prompt of which nothing is generated: one token, which nobody sees, takes the
// time of the pooling step.
func (e *Engine) parseEmbeddings(h http.Header, f *fields) (*call, *apiError) {
	if _, ok := f.raw("input"); !ok {
		return nil, invalid("body.input", "missing", "Field required", "<body>")
	}
	as := map[string]json.RawMessage{"prompt": f.m["input"], "max_tokens": json.RawMessage("1")}
	if model, ok := f.raw("model"); ok {
		as["model"] = model
	}
	return e.parse(apiCompletions, h, marshal(as))
}

// vector is a unit vector as JSON: numbers, or their 32-bit little-endian form in base64.
func vector(seed uint64, size int, packed bool) json.RawMessage {
	v, sum := make([]float64, size), 0.0
	for i := range v {
		v[i] = float64(mix(seed+uint64(i))%2001)/1000 - 1
		sum += v[i] * v[i]
	}
	length := math.Sqrt(max(sum, 1e-9))
	raw := make([]byte, 0, 4*size)
	for i := range v {
		v[i] /= length
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(float32(v[i])))
	}
	if packed {
		return marshal(base64.StdEncoding.EncodeToString(raw))
	}
	return marshal(v)
}

// received records a generation request and picks its fault. It reports whether the fault has answered it.
func (p *process) received(x *exchange, c *call, body []byte) bool {
	rec := Recorded{
		At: time.Now(), Method: x.r.Method, URI: x.r.RequestURI, Header: x.r.Header.Clone(), Body: body,
		RequestID: x.r.Header.Get(headerRequestID), Attempt: x.r.Header.Get(headerAttempt), Phase: phasePlain,
	}
	if c != nil {
		rec.Phase = c.phase
	}
	p.e.records.body(rec)
	x.call = c
	x.fault = p.e.faults.pick(p.e, c)
	return x.fault != nil && !x.fault.Late && p.injectEarly(x)
}
