// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"strconv"
	"time"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

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
	gathering   bool // the body's last chunk is ours and may grow
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
	switch {
	case headers != nil:
	case first.GetResponseHeaders() != nil || first.GetResponseBody() != nil || first.GetResponseTrailers() != nil:
		return st.respond(first) // a gateway that shows us responses only
	default:
		return st.refuse(fmt.Errorf("%w (its request_header_mode must be SEND)", director.ErrBodyMode))
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
	// Refused before it is read: a BUFFERED body above gRPC's limit would end the stream with an error of gRPC's own.
	if n, err := strconv.ParseInt(st.in.Headers.Get("content-length"), 10, 64); err == nil && n > st.server.opts.MaxBodyBytes {
		return st.tooLarge()
	}
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
	ctx := st.grpc.Context()
	if x.Orchestrates() {
		// The end of the drain time ends the held phase with an answer, not with the stream.
		held, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(st.server.cutting, func() { cancel(errShuttingDown) })()
		ctx = held
	}
	st.answer, err = x.Run(ctx)
	if err != nil && errors.Is(context.Cause(ctx), errShuttingDown) {
		return errShuttingDown
	}
	return err
}

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
	answer := statusOf(err)
	st.server.metrics.refused(answer.reason)
	if sendErr := st.grpc.Send(immediateAnswer(answer, err, inference.PathAPI(st.in.Headers.Get(":path")))); sendErr != nil && !errors.Is(sendErr, io.EOF) {
		st.server.log.Debug("refusal not delivered", slog.String("reason", answer.reason), slog.Any("err", sendErr))
	}
	return nil
}

// recovered answers a panic of ours or of a plugin: 500 where an answer is still possible, the stack in the log.
func (st *stream) recovered(cause any, stack []byte) error {
	st.panicked(cause, stack)
	switch {
	case st.immediate || (st.requestOver && st.responseMode == modeNone):
		return nil
	case st.requestOver:
		// With OK the gateway would take the response to be complete: the client must see that it is cut.
		return grpcstatus.Error(codes.Internal, errPanic.Error())
	default:
		return st.refuse(errPanic)
	}
}

func (st *stream) panicked(cause any, stack []byte) {
	st.server.metrics.panics.Inc()
	st.server.log.Error("panic while handling a request", slog.Any("err", cause), slog.String("stack", string(stack)))
}

// close gives back whatever the stream still holds, however it ended.
func (st *stream) close() {
	defer func() {
		if r := recover(); r != nil {
			st.server.metrics.panics.Inc()
			st.server.log.Error("panic while closing a request", slog.Any("err", r), slog.String("stack", string(debug.Stack())))
		}
	}()
	st.release()
	st.exchange.Done(st.end())
}
