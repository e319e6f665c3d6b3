// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"
)

var errInjected = errors.New("fault injected")

// injectEarly does the faults that come before any byte of the answer. It reports whether the exchange is over.
func (p *process) injectEarly(x *exchange) bool {
	f := x.fault
	ctx := x.r.Context()
	switch f.Kind {
	case faultResetBefore:
		x.hangUp()
	case faultHang:
		<-ctx.Done()
	case faultStatus:
		x.failStatus()
	case faultDie:
		if !f.diesAt("", atArrival, atDone) {
			return false
		}
		p.kill(f)
	case faultDelay:
		var sl sleeper
		defer sl.close()
		return !sl.sleep(ctx, p.scaled(f.delay()))
	default:
		return false
	}
	return true
}

func (x *exchange) failStatus() {
	f := x.fault
	status := f.Status
	if status == 0 {
		status = http.StatusServiceUnavailable
	}
	after := f.RetryAfter
	if after == "" && status == http.StatusTooManyRequests {
		after = "1"
	}
	if after != "" && after != "-" {
		x.w.Header().Set("Retry-After", after)
	}
	body := []byte(f.Body)
	if f.Body == "" {
		body = x.errorBody(&apiError{status: status, kind: kindOf(status), message: "injected fault"})
	}
	x.json(status, body)
}

// kindOf is vLLM's error type of a status.
func kindOf(status int) string {
	switch {
	case status == http.StatusNotFound:
		return "NotFoundError"
	case status == http.StatusServiceUnavailable:
		return "ServiceUnavailableError"
	case status < http.StatusInternalServerError:
		return "BadRequestError"
	}
	return "InternalServerError"
}

// answerJSON writes a complete answer, or what the fault leaves of it.
func (x *exchange) answerJSON(body []byte) {
	f := x.fault
	if f == nil {
		x.json(http.StatusOK, body)
		return
	}
	switch f.Kind {
	case faultMalformed:
		x.json(http.StatusOK, append([]byte(`{"id": nope, `), body[1:]...))
	case faultTruncated:
		x.json(http.StatusOK, body[:len(body)/2])
	case faultHuge:
		size := f.Size
		if size == 0 {
			size = 8 << 20
		}
		x.json(http.StatusOK, append(body[:len(body)-1], padding(size)...))
	case faultContentType:
		x.w.Header().Set("Content-Type", x.contentType(""))
		x.json(http.StatusOK, body)
	case faultResetAfter, faultResetMid, faultHangMid, faultSlow, faultDie:
		x.breakJSON(body)
	default:
		x.json(http.StatusOK, body)
	}
}

// padding is a JSON object's end with n blanks before it.
func padding(n int) []byte {
	out := make([]byte, n+1)
	for i := range n {
		out[i] = ' '
	}
	out[n] = '}'
	return out
}

// breakJSON announces the whole body and sends it slowly or in part.
func (x *exchange) breakJSON(body []byte) {
	h := x.w.Header()
	h["Content-Type"] = []string{"application/json"}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	x.w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(x.w)
	send := func(b []byte) bool {
		_, err := x.w.Write(b)
		return err == nil && rc.Flush() == nil
	}
	switch x.fault.Kind {
	case faultResetAfter:
		send(nil)
		x.hangUp()
	case faultResetMid:
		send(body[:len(body)/2])
		x.hangUp()
	case faultHangMid:
		send(body[:len(body)/2])
		<-x.r.Context().Done()
	case faultSlow:
		x.trickle(x.r.Context(), body, send)
	case faultDie:
		if x.fault.At == atStreaming {
			send(body[:len(body)/2])
		} else {
			send(nil)
		}
		x.p.kill(x.fault)
	}
}

// trickle sends body at the fault's rate, ten times a second.
func (x *exchange) trickle(ctx context.Context, body []byte, send func([]byte) bool) {
	rate := x.fault.BytesPerSecond
	if rate <= 0 {
		rate = 1024
	}
	var sl sleeper
	defer sl.close()
	for step := max(rate/10, 1); len(body) > 0; {
		n := min(step, len(body))
		if !send(body[:n]) || !sl.sleep(ctx, time.Duration(n)*time.Second/time.Duration(rate)) {
			return
		}
		body = body[n:]
	}
}

// breakEvent writes one event of a stream, or breaks the stream there.
func (s *sse) breakEvent(f *Fault, text string) error {
	due := s.events > f.after()
	switch f.Kind {
	case faultResetAfter:
		s.x.hangUp()
		return errInjected
	case faultResetMid:
		if due {
			s.x.hangUp()
			return errInjected
		}
	case faultHangMid:
		if due {
			<-s.x.r.Context().Done()
			return errInjected
		}
	case faultTruncatedSSE:
		if due {
			_ = s.write(text[:len(text)/2])
			return errInjected
		}
	case faultSplitSSE:
		s.held += text
		return s.cut(max(f.Bytes, 1))
	case faultDie:
		if f.At == atFirstByte || due && f.At == atStreaming {
			s.x.p.kill(f)
			return errInjected
		}
	case faultSlow:
		s.x.trickle(s.x.r.Context(), []byte(text), func(b []byte) bool { return s.write(string(b)) == nil })
		return s.x.r.Context().Err()
	}
	return s.write(text)
}

// cut writes what is held in pieces of n bytes and keeps the rest.
func (s *sse) cut(n int) error {
	for len(s.held) >= n && s.held != "" {
		if err := s.write(s.held[:n]); err != nil {
			return err
		}
		s.held = s.held[n:]
	}
	return nil
}

// drain writes what is held at a stream's end.
func (s *sse) drain() { _ = s.cut(max(len(s.held), 1)) }

// oddHandle is the handle that goes out: as it is, withheld, or in a shape that only opaque copying survives.
func (x *exchange) oddHandle(h json.RawMessage) json.RawMessage {
	if x.fault == nil {
		return h
	}
	switch x.fault.Kind {
	case faultNoHandle:
		return nil
	case faultOddHandle:
		odd := `{"zz_first":9223372036854775807,"zz_big":123456789012345678901234567890,"zz_escapes":"\u0041\/\"\\ \ud83d\ude00",` +
			`"zz_nested":{"b":[1.50,1e400,{"a":null}],"a":"b"},"zz_float":0.1000000000000000055,`
		return json.RawMessage(odd + string(h[1:]))
	}
	return h
}
