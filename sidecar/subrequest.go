// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"time"
)

const (
	// drainBytes is how much of an answer that nobody wants is read so that its connection can be kept.
	drainBytes = 64 << 10
	// keptBuffer is the largest buffer kept for the next answer.
	keptBuffer = 64 << 10
)

// send sends a sub-request of a phase. take gets the body of a 200, which is its own only until it returns, and says in
// the result what it is worth.
func (o *Orchestrator) send(ctx context.Context, s *settings, phase string, req *http.Request, take func(answer []byte, res *result)) result {
	o.metrics.sentBytes.WithLabelValues(phase).Add(float64(req.ContentLength))
	resp, err := s.transport.RoundTrip(req)
	if err != nil {
		return result{reason: reasonOfFailure(ctx, err), err: err}
	}
	defer resp.Body.Close()
	res := result{status: resp.StatusCode, answered: time.Now(), reason: reasonOfStatus(resp.StatusCode)}
	if res.reason != reasonOK {
		_, _ = io.CopyN(io.Discard, resp.Body, drainBytes)
		return res
	}
	buf := o.buffer()
	defer o.keep(buf)
	limit := s.Prefill.MaxResponseBytes
	n, err := buf.ReadFrom(io.LimitReader(resp.Body, limit+1))
	o.metrics.heldBytes.Add(float64(buf.Len()))
	o.metrics.receivedBytes.WithLabelValues(phase).Add(float64(n))
	switch {
	case err != nil:
		res.reason, res.err = reasonOfFailure(ctx, err), err
	case n > limit:
		res.reason = reasonTooLarge
	default:
		take(buf.Bytes(), &res)
	}
	return res
}

// buffer returns an empty buffer for an answer; keep takes it back.
func (o *Orchestrator) buffer() *bytes.Buffer {
	if buf, ok := o.buffers.Get().(*bytes.Buffer); ok {
		return buf
	}
	return new(bytes.Buffer)
}

func (o *Orchestrator) keep(buf *bytes.Buffer) {
	o.metrics.heldBytes.Sub(float64(buf.Len()))
	if buf.Cap() <= keptBuffer {
		buf.Reset()
		o.buffers.Put(buf)
	}
}
