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

// take keeps a chunk of the body, within both limits.
func (st *stream) take(chunk []byte) error {
	if int64(st.in.Body.Len+len(chunk)) > st.server.opts.MaxBodyBytes {
		return st.tooLarge()
	}
	if err := st.server.opts.Gate.Hold(len(chunk)); err != nil {
		return err
	}
	st.held += len(chunk)
	st.keep(chunk)
	return nil
}

func (st *stream) tooLarge() error {
	return fmt.Errorf("%w: limit %d bytes (limits.maxBodyBytes)", errBodyTooLarge, st.server.opts.MaxBodyBytes)
}

// smallChunk is the size in bytes below which chunks are gathered: each kept one costs a message around it, and a client
// that sends byte by byte would make the gate count a fraction of what is really held.
const smallChunk = 4 << 10

// keep adds a chunk to the body: the slice that came, or a copy of a small one behind the small ones before it.
func (st *stream) keep(chunk []byte) {
	body := &st.in.Body
	switch last := len(body.Chunks) - 1; {
	case last < 0 || len(chunk) >= smallChunk || len(chunk) == 0:
		body.Append(chunk)
		st.gathering = false
	case st.gathering && cap(body.Chunks[last])-len(body.Chunks[last]) >= len(chunk):
		body.Chunks[last] = append(body.Chunks[last], chunk...)
		body.Len += len(chunk)
	default:
		body.Append(append(make([]byte, 0, 4*smallChunk), chunk...))
		st.gathering = true
	}
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
	answer := statusOf(err)
	st.server.metrics.refused(answer.reason)
	if sendErr := st.grpc.Send(immediateAnswer(answer, err, inference.PathAPI(st.in.Headers.Get(":path")))); sendErr != nil && !errors.Is(sendErr, io.EOF) {
		st.server.log.Debug("refusal not delivered", slog.String("reason", answer.reason), slog.Any("err", sendErr))
	}
	return nil
}

// recovered answers a panic of ours or of a plugin: 500 where an answer is still possible, the stack in the log.
func (st *stream) recovered(cause any, stack []byte) error {
	st.server.metrics.panics.Inc()
	st.server.log.Error("panic while handling a request", slog.Any("err", cause), slog.String("stack", string(stack)))
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

// release ends the hold on the body: after the request phase only ids and counters are kept.
func (st *stream) release() {
	if st.held > 0 {
		st.server.opts.Gate.Free(st.held)
		st.held = 0
	}
	st.in.Body = inference.Body{}
	if st.requestOver && st.exchange != nil {
		st.exchange.ForgetBody()
		st.answer.Body = nil
	}
}
