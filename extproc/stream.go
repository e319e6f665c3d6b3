// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/inference"
)

// Body modes, short.
const (
	modeNone     = procv3.ProcessingMode_NONE
	modeStreamed = procv3.ProcessingMode_STREAMED
	modeBuffered = procv3.ProcessingMode_BUFFERED
	modeDuplex   = procv3.ProcessingMode_FULL_DUPLEX_STREAMED
)

// errClientGone ends a stream quietly: nobody is left to be answered.
var errClientGone = errors.New("client gone")

// stream is one HTTP request. Everything in it belongs to the handler's goroutine.
type stream struct {
	server *Server
	grpc   extprocv3.ExternalProcessor_ProcessServer
	start  time.Time

	requestMode, responseMode procv3.ProcessingMode_BodySendMode

	in          director.Incoming
	exchange    *director.Exchange
	answer      *director.Answer
	held        int  // bytes taken from the gate
	trailers    bool // the request body ended with trailers
	requestOver bool // the request was answered
	immediate   bool // an ImmediateResponse was sent: nothing may follow
	control     []string

	response responsePhase
}

// run takes the stream from its first message to its end.
func (st *stream) run() error {
	first, err := st.grpc.Recv()
	if err != nil {
		return nil //nolint:nilerr // a stream without a first message asks nothing
	}
	if first.GetObservabilityMode() {
		return st.observe()
	}
	st.requestMode, st.responseMode = modes(first)
	headers := first.GetRequestHeaders()
	if headers == nil {
		return st.respond(first) // a gateway that shows us responses only
	}
	if err := st.request(first, headers); err != nil {
		return st.refuse(err)
	}
	if st.immediate {
		return nil
	}
	return st.respond(nil)
}

// modes reads the body modes in force; a gateway that does not announce them gets what the protocol demands (P2).
func modes(first *extprocv3.ProcessingRequest) (request, response procv3.ProcessingMode_BodySendMode) {
	if c := first.GetProtocolConfig(); c != nil {
		return c.GetRequestBodyMode(), c.GetResponseBodyMode()
	}
	return modeDuplex, modeDuplex
}

// request is the request phase: collect, decide, answer.
func (st *stream) request(first *extprocv3.ProcessingRequest, headers *extprocv3.HttpHeaders) error {
	st.in.Start = st.start
	st.in.Headers, st.control = readHeaders(headers)
	if !st.server.opts.IgnoreSubset {
		st.in.Subset = readSubset(first.GetMetadataContext())
	}
	if headers.GetEndOfStream() {
		return st.decideOnHeaders()
	}
	st.in.HasBody = true
	switch st.requestMode {
	case modeDuplex:
		return st.duplex()
	case modeBuffered:
		return st.buffered()
	default:
		st.in.Uninspected = true
		return st.decideOnHeaders()
	}
}

// decideOnHeaders answers a request whose headers are all there is, or all we are shown.
func (st *stream) decideOnHeaders() error {
	if err := st.decide(); err != nil {
		return err
	}
	return st.send(headersAnswer(st.answer, st.control, false))
}

// duplex holds the header answer until the body has ended, then sends header answer, body and, where trailers ended the
// body, the trailers answer: with end_of_stream set and no trailers answer the request would hang.
func (st *stream) duplex() error {
	for over := false; !over; {
		msg, err := st.grpc.Recv()
		if err != nil {
			return errClientGone
		}
		switch m := msg.GetRequest().(type) {
		case *extprocv3.ProcessingRequest_RequestBody:
			if err := st.take(m.RequestBody.GetBody()); err != nil {
				return err
			}
			over = m.RequestBody.GetEndOfStream()
		case *extprocv3.ProcessingRequest_RequestTrailers:
			st.trailers, over = true, true
		default:
			st.server.metrics.unexpected.Inc()
		}
	}
	if err := st.decide(); err != nil {
		return err
	}
	if err := st.send(headersAnswer(st.answer, st.control, st.answer.Body != nil)); err != nil {
		return err
	}
	if err := st.sendBody(); err != nil {
		return err
	}
	if st.trailers {
		return st.send(requestTrailersAnswer)
	}
	return nil
}

// buffered lets the headers pass at once, or the gateway would wait for them with its timer running, and puts the whole
// answer on the one body message.
func (st *stream) buffered() error {
	if err := st.send(requestHeadersPass); err != nil {
		return err
	}
	msg, err := st.grpc.Recv()
	if err != nil {
		return errClientGone
	}
	body := msg.GetRequestBody()
	if body == nil {
		return fmt.Errorf("%w: a BUFFERED gateway sent %T for the body", errProtocol, msg.GetRequest())
	}
	if err := st.take(body.GetBody()); err != nil {
		return err
	}
	if err := st.decide(); err != nil {
		return err
	}
	return st.send(bufferedAnswer(st.answer, st.control))
}

// take keeps a chunk of the body, within both limits.
func (st *stream) take(chunk []byte) error {
	if int64(st.in.Body.Len+len(chunk)) > st.server.opts.MaxBodyBytes {
		return fmt.Errorf("%w: limit %d bytes (limits.maxBodyBytes)", errBodyTooLarge, st.server.opts.MaxBodyBytes)
	}
	if err := st.server.opts.Gate.Hold(len(chunk)); err != nil {
		return err
	}
	st.held += len(chunk)
	st.in.Body.Append(chunk)
	return nil
}

// decide asks the director; in BUFFERED mode the gateway is first asked for the time that sub-requests may take.
func (st *stream) decide() error {
	x, err := st.server.opts.Director.Begin(&st.in)
	if err != nil {
		return err
	}
	st.exchange = x
	if st.requestMode == modeBuffered && x.Orchestrates() {
		if err := st.send(overrideTimeout(st.server.opts.OverrideTimeout())); err != nil {
			return err
		}
	}
	st.answer, err = x.Run(st.grpc.Context())
	return err
}

// sendBody re-emits the body: the chunks that came, or the edited ones. Small pieces travel as one message.
func (st *stream) sendBody() error {
	chunks, size := st.in.Body.Chunks, st.in.Body.Len
	if st.answer.Body != nil {
		chunks, size = st.answer.Body.Chunks(), st.answer.Body.Len()
	}
	if len(chunks) > 1 && size <= joinBelow {
		joined := make([]byte, 0, size)
		for _, c := range chunks {
			joined = append(joined, c...)
		}
		chunks = [][]byte{joined}
	}
	for i, c := range chunks {
		if err := st.send(streamedRequestBody(c, i == len(chunks)-1 && !st.trailers)); err != nil {
			return err
		}
	}
	if len(chunks) == 0 && !st.trailers {
		return st.send(streamedRequestBody(nil, true))
	}
	return nil
}

// joinBelow is the size in bytes up to which the pieces of a spliced body are sent as one message: one message costs
// more than copying this much.
const joinBelow = 64 << 10

// send sends one message; a gateway that cannot be reached any more has no client either.
func (st *stream) send(m *extprocv3.ProcessingResponse) error {
	if err := st.grpc.Send(m); err != nil {
		return errClientGone
	}
	return nil
}

// observe reads an observability-mode stream to its end: answers would be ignored, and sub-requests must never run.
func (st *stream) observe() error {
	for {
		if _, err := st.grpc.Recv(); err != nil {
			return nil //nolint:nilerr // the end of a stream that asks nothing
		}
	}
}

// refuse turns an error of the request phase into an ImmediateResponse; a client that left gets none.
func (st *stream) refuse(err error) error {
	if errors.Is(err, errClientGone) || (errors.Is(err, context.Canceled) && st.grpc.Context().Err() != nil) {
		return nil //nolint:nilerr // nobody is left to be answered
	}
	st.immediate = true
	status := statusOf(err)
	st.server.metrics.refused(status.reason)
	if sendErr := st.grpc.Send(immediateAnswer(status, err, inference.PathAPI(st.in.Headers.Get(":path")))); sendErr != nil && !errors.Is(sendErr, io.EOF) {
		st.server.log.Debug("refusal not delivered", slog.String("reason", status.reason), slog.Any("err", sendErr))
	}
	return nil
}

// recovered answers a panic of ours or of a plugin: 500 where an answer is still possible, the stack in the log.
func (st *stream) recovered(cause any, stack []byte) error {
	st.server.metrics.panics.Inc()
	st.server.log.Error("panic while handling a request", slog.Any("err", cause), slog.String("stack", string(stack)))
	if st.requestOver || st.immediate {
		return nil
	}
	return st.refuse(errPanic)
}

// close gives back whatever the stream still holds, however it ended.
func (st *stream) close() {
	st.release()
	st.exchange.Done(st.end())
}

// release ends the hold on the body: after the request phase only ids and counters are kept.
func (st *stream) release() {
	if st.held > 0 {
		st.server.opts.Gate.Free(st.held)
		st.held = 0
	}
	st.in.Body = inference.Body{}
}
