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
	keeps    bool  // bytes may be held back: more messages come, or can be sent, before the response ends
	counted  bool  // that usage was corrected
	failure  error // why decode waits in vain
}

// respond is the response phase: echo what is shown, notice the end. first is the stream's first message where there was
// no request phase.
func (st *stream) respond(first *extprocv3.ProcessingRequest) error {
	st.requestOver = true
	st.release()
	recv := st.grpc.Recv
	if first == nil && (st.responseMode == modeNone || st.exchange.Pending() != nil) {
		recv = st.wakefulRecv()
	}
	for {
		msg := first
		if first = nil; msg == nil {
			var err error
			if msg, err = recv(); err != nil {
				if errors.Is(err, errSettled) {
					return st.takeBack()
				}
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

// onResponse handles one message and makes its answer; nil for messages that need none.
func (st *stream) onResponse(msg *extprocv3.ProcessingRequest) *extprocv3.ProcessingResponse {
	switch m := msg.GetRequest().(type) {
	case *extprocv3.ProcessingRequest_ResponseHeaders:
		return st.onResponseHeaders(msg, m.ResponseHeaders)
	case *extprocv3.ProcessingRequest_ResponseBody:
		return st.onResponseBody(m.ResponseBody)
	case *extprocv3.ProcessingRequest_ResponseTrailers:
		if held := st.response.usage.Held(); len(held) > 0 && st.responseMode == modeDuplex && st.send(streamedResponseBody(held, false)) != nil {
			return nil
		}
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
	status, scanning, trailers := readResponse(h)
	st.response.scanning = scanning && st.responseMode != modeNone
	// A STREAMED body cannot grow any more once trailers have come instead of its end.
	st.response.keeps = st.responseMode == modeDuplex || st.responseMode == modeStreamed && !trailers
	if st.exchange == nil {
		return responseHeadersPass
	}
	st.exchange.ResponseHeaders(st.grpc.Context(), time.Now(), status, readServed(msg), readUndelivered(msg))
	if h.GetEndOfStream() {
		st.finish()
	}
	return responseHeadersAnswer(st.answer)
}

func (st *stream) onResponseBody(b *extprocv3.HttpBody) *extprocv3.ProcessingResponse {
	st.response.messages++
	if st.response.bytes == 0 && len(b.GetBody()) > 0 && st.responseMode != modeBuffered && st.exchange != nil {
		st.exchange.BodyBegins(time.Now())
	}
	st.response.bytes += len(b.GetBody())
	body, changed := b.GetBody(), false
	if st.response.scanning {
		body, changed = st.correct(body, b.GetEndOfStream())
	}
	if b.GetEndOfStream() {
		st.finish()
	}
	switch {
	case st.responseMode == modeDuplex:
		return streamedResponseBody(body, b.GetEndOfStream())
	case changed:
		return replacedResponseBody(body)
	default:
		return responseBodyPass
	}
}

// correct reads usage, and writes the prefill's count of cached tokens over decode's, which may count what was transferred.
func (st *stream) correct(chunk []byte, last bool) (body []byte, changed bool) {
	u := &st.response.usage
	body, changed = u.Correct(chunk, st.exchange.CachedTokens(), last || !st.response.keeps)
	if u.Corrected() && !st.response.counted {
		st.response.counted = true
		st.server.metrics.corrected.Inc()
	}
	return body, changed
}

// finish notes the end of the response as soon as it is seen.
func (st *stream) finish() {
	st.response.over = true
	if st.exchange != nil {
		st.exchange.Usage(st.response.usage.Usage(), st.response.bytes)
		st.exchange.Done(director.EndSeen)
	}
}

// readResponse reads the status, whether the body is one whose usage can be read, and whether trailers are announced.
func readResponse(h *extprocv3.HttpHeaders) (status int, scannable, trailers bool) {
	scannable = true
	for _, hv := range h.GetHeaders().GetHeaders() {
		switch hv.GetKey() {
		case ":status":
			status, _ = strconv.Atoi(headerValue(hv)) // 0 is what a missing status is, too
		case "content-encoding":
			scannable = headerValue(hv) == "identity"
		case "trailer":
			trailers = true
		}
	}
	return status, scannable, trailers
}
