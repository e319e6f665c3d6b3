// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"errors"
	"runtime/debug"
	"time"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

var (
	// errDrained ends a quiet stream that we end ourselves.
	errDrained = errors.New("drained")
	// errSettled ends a stream whose decode waits in vain for the prefill beside it; response.failure says why.
	errSettled = errors.New("prefill beside decode failed")
)

// received is what Recv returned.
type received struct {
	msg *extprocv3.ProcessingRequest
	err error
}

// wakefulRecv is Recv for streams that something else may wake: the end of a prefill that runs beside decode and, where
// only the response headers and the end will come, the end of the server.
func (st *stream) wakefulRecv() func() (*extprocv3.ProcessingRequest, error) {
	arrived := st.receive()
	var next []received // arrived while a response's head was held
	return func() (*extprocv3.ProcessingRequest, error) {
		if len(next) > 0 {
			r := next[0]
			next = next[1:]
			return r.msg, r.err
		}
		draining, cutting := st.ends()
		for {
			select {
			case r := <-arrived:
				if good(r.msg.GetResponseHeaders()) && st.exchange.EndsWithPrefill() {
					r, next = st.withhold(r, arrived)
				}
				return r.msg, r.err
			case <-st.exchange.Pending():
				if st.response.failure = st.settle(); st.response.failure != nil {
					return nil, errSettled
				}
			case <-draining:
				return nil, errDrained
			case <-cutting:
				return nil, errDrained
			}
		}
	}
}

// ends are what ends a quiet stream from our side: the drain, once response headers were answered, and the cut. Streams
// that show bodies run on.
func (st *stream) ends() (draining, cutting <-chan struct{}) {
	if st.responseMode != modeNone {
		return nil, nil
	}
	if st.response.headers {
		draining = st.server.draining
	}
	return draining, st.server.cutting.Done()
}

// good reports whether h is the head of a response that is no error.
func good(h *extprocv3.HttpHeaders) bool {
	status, _, _ := readResponse(h)
	return status >= 200 && status < 300
}

// withhold says what to do with a response's head: pass it on, then what arrived meanwhile, or end the stream instead.
func (st *stream) withhold(head received, arrived <-chan received) (now received, next []received) {
	next = st.hold(arrived)
	switch {
	case st.response.failure != nil:
		return received{err: errSettled}, nil
	case len(next) > 0 && next[0].err != nil: // nobody waits for the head any more
		return received{err: next[0].err}, nil
	default:
		return head, next
	}
}

// hold keeps the head of a streamed response back until the prefill beside decode is over: engines send it before they
// have computed anything, and as long as it was not passed on, a prefill that fails is a 502. It gives up when the response
// goes on, at the end of the server, and, where the gateway counts how long it waits for the answer to the head, after
// Options.HoldResponse. It returns what arrived meanwhile.
func (st *stream) hold(arrived <-chan received) (next []received) {
	var enough <-chan time.Time
	if st.responseMode != modeDuplex {
		timer := time.NewTimer(st.server.opts.HoldResponse())
		defer timer.Stop()
		enough = timer.C
	}
	select {
	case <-st.exchange.Pending():
		st.response.failure = st.settle()
	case r := <-arrived:
		next = append(next, r)
	case <-enough:
	case <-st.server.cutting.Done():
	}
	return next
}

// settle takes over what the prefill beside decode came to. A panic of its connector is a failure, too: decode waits in
// vain, and the stream must not just end, by which a quiet gateway would let the response go on.
func (st *stream) settle() (err error) {
	defer func() {
		if r := recover(); r != nil {
			st.panicked(r, debug.Stack())
			err = errPanic
		}
	}()
	return st.exchange.Settle(st.grpc.Context())
}

// receive hands over what Recv returns. The channel holds all that can come on a quiet stream, so the goroutine ends with
// the stream even when nobody listens any more.
func (st *stream) receive() <-chan received {
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
	return arrived
}

// takeBack ends a request whose decode waits in vain: with an answer of ours as long as the response has not begun, else
// with an error, by which the gateway cuts the response off. Either way it cancels the decode (measured on Envoy 1.40).
func (st *stream) takeBack() error {
	begun := st.response.headers
	if err := st.refuse(st.response.failure); err != nil || !begun {
		return err
	}
	return grpcstatus.Error(codes.Aborted, errSettled.Error())
}
