// SPDX-License-Identifier: Apache-2.0

// Package gatewaytest is a gateway for tests and benchmarks: it asks an ext_proc server for each request's endpoint and
// sends the request there, in the order of messages that Envoy 1.40 was seen to keep, without Envoy's weight. Where a
// test is about Envoy itself, package envoytest has the real one. Its one type is the [Gateway].
package gatewaytest

import (
	"context"
	"fmt"
	"net/http"
	"time"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// Body modes, short.
const (
	Duplex   = procv3.ProcessingMode_FULL_DUPLEX_STREAMED
	Buffered = procv3.ProcessingMode_BUFFERED
	None     = procv3.ProcessingMode_NONE
)

// Options describe a gateway.
type Options struct {
	Picker   string // host:port of the ext_proc server
	Request  procv3.ProcessingMode_BodySendMode
	Response procv3.ProcessingMode_BodySendMode // None is the quiet mode: response headers are shown, bodies are not
	// Unseen ends each stream as soon as the request was answered, as a gateway without a response phase does.
	Unseen bool
	// Resend sends every request a second time, to the same endpoint, whatever came of the first: a gateway with a route
	// retry that Baton's configurations do not have.
	Resend bool
}

// Gateway serves requests. Safe for concurrent use.
type Gateway struct {
	opts   Options
	conn   *grpc.ClientConn
	client extprocv3.ExternalProcessorClient
	up     *http.Transport
}

// New connects to the picker.
func New(o Options) (*Gateway, error) {
	conn, err := grpc.NewClient(o.Picker, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	return &Gateway{
		opts: o, conn: conn, client: extprocv3.NewExternalProcessorClient(conn),
		up: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 256, IdleConnTimeout: 4 * time.Second},
	}, nil
}

// Close ends the connection to the picker.
func (g *Gateway) Close() error {
	g.up.CloseIdleConnections()
	return g.conn.Close() //nolint:wrapcheck // says all there is
}

// Reply is what the client got.
type Reply struct {
	Status      int
	Header      http.Header
	Body        []byte
	Destination string // the endpoint that the picker named; "" when it answered by itself
	Immediate   bool   // the picker answered by itself
	Cut         bool   // the answer was cut off after its headers
	Sent        []byte // the body that went to Destination
}

// Do takes one request through. The error is the context's, or says that the picker broke the protocol.
func (g *Gateway) Do(ctx context.Context, path string, body []byte, headers ...string) (*Reply, error) {
	r, err := g.do(ctx, path, body, headers)
	switch {
	case err != nil && ctx.Err() != nil:
		return r, context.Cause(ctx) // what broke, broke because of it
	case status.Code(err) == codes.DeadlineExceeded: // gRPC's timer is a little ahead of the context's
		return r, context.DeadlineExceeded
	}
	return r, err
}

func (g *Gateway) do(ctx context.Context, path string, body []byte, headers []string) (*Reply, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A stream outlives its client by an orderly end, see leave.
	streamCtx, endStream := context.WithCancel(context.WithoutCancel(ctx))
	defer endStream()
	stream, err := g.client.Process(streamCtx)
	if err != nil {
		return nil, fmt.Errorf("ext_proc stream: %w", err)
	}
	defer func() { _ = stream.CloseSend() }() // fails only on a stream that has ended
	x := &exchange{g: g, stream: stream, inbox: make(chan received, 1), ctx: ctx}
	go x.receive(x.inbox, streamCtx.Done())
	defer x.leave()
	header := http.Header{"Content-Type": {"application/json"}}
	for i := 0; i+1 < len(headers); i += 2 {
		header.Set(headers[i], headers[i+1])
	}
	pick, err := x.ask(path, body, header)
	if err != nil {
		return nil, err
	}
	if pick.immediate != nil {
		return pick.immediate, nil
	}
	if g.opts.Unseen {
		endStream() // by a reset, as Envoy was seen to do
		x.inbox = nil
	}
	return x.forward(ctx, path, pick)
}

// exchange is one request.
type exchange struct {
	g      *Gateway
	ctx    context.Context //nolint:containedctx // of the one call that it lives in
	stream extprocv3.ExternalProcessor_ProcessClient
	inbox  chan received
	ended  bool // inbox has given the stream's error, the last it gives
}

type received struct {
	msg *extprocv3.ProcessingResponse
	err error
}

// receive reads the stream into inbox until it was ended, so that a message can arrive while the model server is waited for.
func (x *exchange) receive(inbox chan<- received, ended <-chan struct{}) {
	for {
		msg, err := x.stream.Recv()
		select {
		case inbox <- received{msg, err}:
		case <-ended:
			return
		}
		if err != nil {
			return
		}
	}
}

// next waits for the picker's next message.
func (x *exchange) next() (*extprocv3.ProcessingResponse, error) {
	select {
	case r := <-x.inbox:
		x.ended = r.err != nil
		return r.msg, r.err
	case <-x.ctx.Done():
		return nil, context.Cause(x.ctx)
	}
}

// over ends the stream in order, and returns when the picker has closed its books.
func (x *exchange) over() {
	_ = x.stream.CloseSend() // fails only on a stream that has ended
	for !x.ended {
		if _, err := x.next(); err != nil {
			return
		}
	}
}

// farewell is how long the reset of a stream whose client left lags behind its END_STREAM. Envoy sends both at once, and
// gRPC may tell the picker of either; which is a matter of luck until the connection has once ended a stream in order, and
// tests of what follows cannot be left to it. Package app's tests with a real Envoy have the two at once.
const farewell = 500 * time.Millisecond

// leave ends the stream of a client that left; do resets it afterwards.
func (x *exchange) leave() {
	if x.ctx.Err() == nil || x.inbox == nil || x.ended {
		return
	}
	_ = x.stream.CloseSend() // fails only on a stream that has ended
	late := time.After(farewell)
	for {
		select {
		case r := <-x.inbox:
			if r.err != nil {
				return
			}
		case <-late:
			return
		}
	}
}
