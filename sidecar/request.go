// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// replayWithin is how soon after an attempt's start its request may be sent anew on another connection to the same
// endpoint. A connection that the endpoint closed while it lay idle shows at once; one that breaks later was at work,
// and another attempt elsewhere is better.
const replayWithin = time.Second

// payload is the body of a sub-request; *inference.Edits is one.
type payload interface {
	Len() int
	Reader() io.ReadCloser
}

// parts is a payload that is no edit of the client's body, though it may share its bytes.
type parts struct{ body inference.Body }

// Len is the number of bytes.
func (p parts) Len() int { return p.body.Len }

// Reader reads them.
func (p parts) Reader() io.ReadCloser { return p.body.Reader() }

// call is a sub-request to an endpoint.
type call struct {
	path    string // of the engine, never the client's, whose prefix or query might mean something else there
	id      string // X-Request-Id
	body    payload
	attempt int // X-Processor-Attempt
}

// request makes a sub-request to the engine's path for the API.
func (o *Orchestrator) request(ctx context.Context, s *settings, j *Job, e *pool.Endpoint, body *inference.Edits, attempt int) *http.Request {
	return o.post(ctx, s, j, e, call{path: enginePath(j.Request.API), id: j.Request.ID, body: body, attempt: attempt})
}

// post makes a sub-request; its headers are ours and those allowed by name.
//
// net/http sends a request anew by itself when a kept connection is reset before the first byte of an answer, but a
// POST only if it is marked as idempotent: an Idempotency-Key with no values does that and is not sent. It may do so
// once for every kept connection, so GetBody permits it once, and only at the start.
func (o *Orchestrator) post(ctx context.Context, s *settings, j *Job, e *pool.Endpoint, c call) *http.Request {
	start := time.Now()
	var replayed atomic.Bool
	req := &http.Request{
		Method:        http.MethodPost,
		URL:           &url.URL{Scheme: s.transport.scheme, Host: e.Hostport, Path: c.path},
		Header:        s.header(ctx, j, c.id, c.attempt),
		Host:          e.Hostport,
		ContentLength: int64(c.body.Len()),
		Body:          filled{c.body.Reader()},
		GetBody: func() (io.ReadCloser, error) {
			if time.Since(start) > replayWithin || !replayed.CompareAndSwap(false, true) {
				return nil, errReplayed
			}
			o.metrics.replays.Inc()
			return filled{c.body.Reader()}, nil
		},
	}
	return req.WithContext(ctx)
}

// filled reads as much as fits each time: an edited body comes in many small parts, and each would be a system call.
type filled struct{ io.ReadCloser }

// Read fills p unless the body ends.
func (f filled) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		m, err := f.ReadCloser.Read(p[n:])
		if n += m; err != nil {
			if n > 0 && errors.Is(err, io.EOF) {
				err = nil // the next call says it
			}
			return n, err
		}
	}
	return n, nil
}

func (s *settings) header(ctx context.Context, j *Job, id string, attempt int) http.Header {
	h := http.Header{
		"Content-Type":        {"application/json"},
		"Accept":              {"application/json"},
		"Accept-Encoding":     {"identity"},
		"User-Agent":          {"baton"},
		"Idempotency-Key":     nil,
		"X-Baton-Depth":       {"1"},
		"X-Processor-Attempt": {strconv.Itoa(attempt)},
	}
	set := func(name, value string) {
		if value != "" && validValue(value) {
			h[name] = append(h[name], value)
		}
	}
	set("X-Request-Id", id)
	if span := trace.SpanContextFromContext(ctx); span.IsValid() {
		set("Traceparent", traceparent(span))
		set("Tracestate", span.TraceState().String())
	} else {
		set("Traceparent", j.Request.Headers.Get("traceparent"))
		set("Tracestate", j.Request.Headers.Get("tracestate"))
	}
	for i := range s.forward {
		for k := range j.Request.Headers {
			if c := &j.Request.Headers[k]; c.Name == s.forward[i].name {
				set(s.forward[i].canonical, c.Value)
			}
		}
	}
	return h
}

// traceparent writes a span in the W3C format.
func traceparent(span trace.SpanContext) string {
	id, sid := span.TraceID(), span.SpanID()
	b := make([]byte, 0, 55)
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, id[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, sid[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, []byte{byte(span.TraceFlags())})
	return string(b)
}

// validValue reports whether net/http would send a header value: it refuses the whole request otherwise, and that
// would look like a fault of the endpoint.
func validValue(v string) bool {
	for i := range len(v) {
		if c := v[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// enginePath is where engines serve an API.
func enginePath(api inference.API) string {
	switch api {
	case inference.Chat:
		return "/v1/chat/completions"
	case inference.Completions:
		return "/v1/completions"
	case inference.Responses:
		return "/v1/responses"
	case inference.Messages:
		return "/v1/messages"
	case inference.Embeddings:
		return "/v1/embeddings"
	case inference.Generate:
		return "/inference/v1/generate"
	case inference.SGLangGenerate:
		return "/generate"
	default:
		return "/"
	}
}
