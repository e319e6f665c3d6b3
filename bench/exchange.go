// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
)

// worker sends one request after another, each on a stream of its own. It belongs to one goroutine.
type worker struct {
	conn   *grpc.ClientConn
	script *script
	burst  bool
	served map[string]encoded // response headers by endpoint
	stamp  func() []byte      // 16 bytes, never the same twice

	latencies []time.Duration // of the requests that ended in the measured part
}

var processStream = &extprocv3.ExternalProcessor_ServiceDesc.Streams[0]

// exchange is one HTTP request as an Envoy takes it through ext_proc. It returns the decision latency: from the last
// message of the request to the answer on its headers.
func (w *worker) exchange(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := w.conn.NewStream(ctx, processStream, extprocv3.ExternalProcessor_Process_FullMethodName)
	if err != nil {
		return 0, err
	}
	stamp := w.stamp()
	for i := range w.script.request {
		if err := s.SendMsg(w.script.stamped(i, stamp)); err != nil {
			return 0, sendFailure(s, err)
		}
	}
	sent := time.Now()
	endpoint, err := w.decision(s)
	latency := time.Since(sent)
	if err != nil {
		return 0, err
	}
	if err := w.body(s, fieldRequestBody, w.script.bodyBytes); err != nil {
		return 0, err
	}
	if err := w.respond(s, endpoint); err != nil {
		return 0, err
	}
	if err := s.CloseSend(); err != nil {
		return 0, err
	}
	var a answer
	if err := s.RecvMsg(&a); !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("end of the stream: %w, answer kind %d", err, a.kind)
	}
	return latency, nil
}

// decision reads the answer on the request headers and checks that header and metadata name the same endpoint.
func (w *worker) decision(s grpc.ClientStream) (string, error) {
	a, err := receive(s, fieldRequestHeaders)
	if err != nil {
		return "", err
	}
	header := ""
	for _, h := range a.headers.GetRequestHeaders().GetResponse().GetHeaderMutation().GetSetHeaders() {
		if h.GetHeader().GetKey() == headerDestination {
			header = string(h.GetHeader().GetRawValue())
		}
	}
	if _, err := netip.ParseAddrPort(header); err != nil {
		return "", fmt.Errorf("header answer: destination: %w", err)
	}
	namespace := a.headers.GetDynamicMetadata().GetFields()[namespaceDestination].GetStructValue()
	if metadata := namespace.GetFields()[headerDestination].GetStringValue(); metadata != header {
		return "", fmt.Errorf("header answer: header %q, metadata %q", header, metadata)
	}
	return header, nil
}

// body reads streamed pieces up to end_of_stream and checks that they have the size that was sent.
func (w *worker) body(s grpc.ClientStream, kind protowire.Number, want int) error {
	for got := 0; ; {
		a, err := receive(s, kind)
		if err != nil {
			return err
		}
		got += a.bytes
		if !a.over {
			continue
		}
		if got != want {
			return fmt.Errorf("body answer: %d bytes came back of %d", got, want)
		}
		return nil
	}
}

// respond is the response phase: the headers alone in quiet mode, and every event after them in full-duplex mode.
func (w *worker) respond(s grpc.ClientStream, endpoint string) error {
	headers, ok := w.served[endpoint]
	if !ok {
		var err error
		if headers, err = responseHeaders(endpoint); err != nil {
			return err
		}
		w.served[endpoint] = headers
	}
	if err := s.SendMsg(headers); err != nil {
		return sendFailure(s, err)
	}
	last, err := receive(s, fieldResponseHeaders)
	if err != nil {
		return err
	}
	echoed := 0
	for _, chunk := range w.script.chunks {
		if err := s.SendMsg(chunk); err != nil {
			return sendFailure(s, err)
		}
		if w.burst {
			continue
		}
		if last, err = receive(s, fieldResponseBody); err != nil {
			return err
		}
		echoed += last.bytes
	}
	switch {
	case len(w.script.chunks) == 0:
		return nil
	case w.burst:
		return w.body(s, fieldResponseBody, w.script.echoBytes)
	case echoed != w.script.echoBytes || !last.over:
		return fmt.Errorf("response: %d bytes came back of %d, end %v", echoed, w.script.echoBytes, last.over)
	}
	return nil
}

// receive reads the next answer, which must be of that kind.
func receive(s grpc.ClientStream, kind protowire.Number) (answer, error) {
	var a answer
	if err := s.RecvMsg(&a); err != nil {
		return a, fmt.Errorf("waiting for answer %d: %w", kind, err)
	}
	if a.kind != kind {
		immediate := a.headers.GetImmediateResponse()
		return a, fmt.Errorf("got answer %d instead of %d: status %d %s", a.kind, kind, immediate.GetStatus().GetCode(), immediate.GetBody())
	}
	return a, nil
}

// sendFailure says why a stream takes no more: gRPC tells it to the receiver.
func sendFailure(s grpc.ClientStream, err error) error {
	if errors.Is(err, io.EOF) {
		var a answer
		if reason := s.RecvMsg(&a); reason != nil {
			err = reason
		}
	}
	return fmt.Errorf("send: %w", err)
}
