// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"errors"
	"io"
	"strconv"
	"time"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/inference"
)

// responsePhase is what was seen of the response.
type responsePhase struct {
	messages int
	headers  bool // response headers were answered
	over     bool // end_of_stream or trailers were seen
	eof      bool // the gateway ended the stream in order
	drained  bool // we ended it
	bytes    int
	usage    inference.UsageScanner
	scanning bool
}

// respond is the response phase: echo what is shown, notice the end. first is the stream's first message where there was
// no request phase.
func (st *stream) respond(first *extprocv3.ProcessingRequest) error {
	st.requestOver = true
	st.release()
	recv := st.grpc.Recv
	if st.responseMode == modeNone && first == nil {
		recv = st.quietRecv()
	}
	for {
		msg := first
		if first = nil; msg == nil {
			var err error
			if msg, err = recv(); err != nil {
				st.response.eof, st.response.drained = errors.Is(err, io.EOF), errors.Is(err, errDrained)
				return nil
			}
		}
		answer := st.onResponse(msg)
		if answer == nil {
			continue
		}
		if err := st.send(answer); err != nil {
			return nil //nolint:nilerr // the gateway left, which is no failure of ours
		}
	}
}

// errDrained ends a quiet stream that we end ourselves.
var errDrained = errors.New("drained")

// quietRecv is Recv for streams on which only the response headers and the end will come: it can be woken to drain.
func (st *stream) quietRecv() func() (*extprocv3.ProcessingRequest, error) {
	type received struct {
		msg *extprocv3.ProcessingRequest
		err error
	}
	// The channel holds all that can come, so the goroutine ends with the stream even when nobody listens any more.
	arrived := make(chan received, 1)
	done := st.grpc.Context().Done()
	go func() {
		for err := error(nil); err == nil; {
			var r received
			r.msg, r.err = st.grpc.Recv()
			err = r.err
			select {
			case arrived <- r:
				continue // tried alone first: how the stream ended must not be lost to a context that ends with it
			default:
			}
			select {
			case arrived <- r:
			case <-done:
				return
			}
		}
	}()
	return func() (*extprocv3.ProcessingRequest, error) {
		draining := st.server.draining
		if !st.response.headers {
			draining = nil
		}
		select {
		case r := <-arrived:
			return r.msg, r.err
		case <-draining:
			return nil, errDrained
		case <-st.server.cutting.Done():
			return nil, errDrained
		}
	}
}

// onResponse handles one message and makes its answer; nil for messages that need none.
func (st *stream) onResponse(msg *extprocv3.ProcessingRequest) *extprocv3.ProcessingResponse {
	switch m := msg.GetRequest().(type) {
	case *extprocv3.ProcessingRequest_ResponseHeaders:
		return st.onResponseHeaders(msg, m.ResponseHeaders)
	case *extprocv3.ProcessingRequest_ResponseBody:
		return st.onResponseBody(m.ResponseBody)
	case *extprocv3.ProcessingRequest_ResponseTrailers:
		st.finish()
		return responseTrailersAnswer
	case *extprocv3.ProcessingRequest_RequestTrailers:
		return requestTrailersAnswer
	case *extprocv3.ProcessingRequest_RequestBody:
		if st.requestMode == modeDuplex {
			return streamedRequestBody(m.RequestBody.GetBody(), m.RequestBody.GetEndOfStream())
		}
		return requestBodyPass
	default:
		st.server.metrics.unexpected.Inc()
		return nil
	}
}

func (st *stream) onResponseHeaders(msg *extprocv3.ProcessingRequest, h *extprocv3.HttpHeaders) *extprocv3.ProcessingResponse {
	st.response.messages++
	st.response.headers = true
	status, scanning := readResponse(h)
	st.response.scanning = scanning && st.responseMode != modeNone
	if st.exchange == nil {
		return responseHeadersPass
	}
	st.exchange.ResponseHeaders(st.grpc.Context(), time.Now(), status, readServed(msg))
	if h.GetEndOfStream() {
		st.finish()
	}
	return responseHeadersAnswer(st.answer)
}

func (st *stream) onResponseBody(b *extprocv3.HttpBody) *extprocv3.ProcessingResponse {
	st.response.messages++
	st.response.bytes += len(b.GetBody())
	if st.response.scanning {
		st.response.usage.Feed(b.GetBody())
	}
	if b.GetEndOfStream() {
		st.finish()
	}
	if st.responseMode == modeDuplex {
		return streamedResponseBody(b.GetBody(), b.GetEndOfStream())
	}
	return responseBodyPass
}

// finish notes the end of the response as soon as it is seen.
func (st *stream) finish() {
	st.response.over = true
	if st.exchange != nil {
		st.exchange.Usage(st.response.usage.Usage(), st.response.bytes)
		st.exchange.Done(director.EndSeen)
	}
}

// readResponse reads the status, and whether the body is one whose usage can be read.
func readResponse(h *extprocv3.HttpHeaders) (status int, scannable bool) {
	scannable = true
	for _, hv := range h.GetHeaders().GetHeaders() {
		switch hv.GetKey() {
		case ":status":
			status, _ = strconv.Atoi(headerValue(hv)) // 0 is what a missing status is, too
		case "content-encoding":
			scannable = headerValue(hv) == "identity"
		}
	}
	return status, scannable
}
