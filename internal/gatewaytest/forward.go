// SPDX-License-Identifier: Apache-2.0

package gatewaytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

// answered is what came of the request that was sent to the model server.
type answered struct {
	resp *http.Response
	err  error
}

// forward sends the request to the endpoint and shows the picker the response.
func (x *exchange) forward(ctx context.Context, path string, p *pick) (*Reply, error) {
	call, cancel := context.WithCancel(ctx)
	defer cancel()
	if x.g.opts.Resend {
		if resp, err := x.send(call, path, p); err == nil {
			_, _ = io.Copy(io.Discard, resp.Body) // whatever came, it is sent again
			_ = resp.Body.Close()
		}
	}
	upstream := make(chan answered, 1)
	go func() {
		resp, err := x.send(call, path, p) //nolint:bodyclose // closed by whoever takes it from the channel
		upstream <- answered{resp, err}
	}()
	select {
	case a := <-upstream:
		return x.respond(p, a)
	case r := <-x.inbox:
		x.ended = r.err != nil
		cancel()
		discard(<-upstream)
		if m := r.msg.GetImmediateResponse(); m != nil {
			reply := immediate(m)
			reply.Destination, reply.Sent = p.destination, p.body
			return reply, nil
		}
		return nil, fmt.Errorf("while the model server was waited for: message %T, error %w", r.msg.GetResponse(), r.err)
	case <-ctx.Done():
		cancel()
		discard(<-upstream)
		return nil, context.Cause(ctx)
	}
}

func discard(a answered) {
	if a.resp != nil {
		_ = a.resp.Body.Close() // nobody reads it
	}
}

// send sends the request to the picked endpoint, once.
func (x *exchange) send(ctx context.Context, path string, p *pick) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+p.destination+path, bytes.NewReader(p.body))
	if err != nil {
		return nil, err //nolint:wrapcheck // becomes the reply
	}
	req.Header = p.header.Clone()
	req.GetBody = nil // a gateway without retries sends once
	return x.g.up.RoundTrip(req)
}

// respond shows the picker the response and gives it to the client.
func (x *exchange) respond(p *pick, a answered) (*Reply, error) {
	details := "via_upstream"
	if a.err != nil {
		if x.ctx.Err() != nil {
			return nil, context.Cause(x.ctx)
		}
		details = "upstream_reset_before_response_started{connection_termination}"
		if op, ok := errors.AsType[*net.OpError](a.err); ok && op.Op == "dial" {
			details = "upstream_reset_before_response_started{remote_connection_failure}"
		}
		a.resp = &http.Response{
			StatusCode: http.StatusServiceUnavailable, Header: http.Header{"Content-Type": {"text/plain"}},
			Body: io.NopCloser(bytes.NewReader([]byte("upstream connect error: " + a.err.Error()))),
		}
	}
	defer a.resp.Body.Close()
	reply := &Reply{Status: a.resp.StatusCode, Header: a.resp.Header.Clone(), Destination: p.destination, Sent: p.body}
	if x.g.opts.Unseen {
		return reply, x.read(a.resp.Body, reply)
	}
	if err := x.stream.Send(responseHeaders(a.resp, p.destination, details)); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("ext_proc response headers: %w", err)
	}
	msg, err := x.next()
	switch {
	case err != nil && x.ctx.Err() != nil:
		return nil, context.Cause(x.ctx)
	case err != nil:
		return nil, fmt.Errorf("ext_proc response headers answer: %w", err)
	case msg.GetImmediateResponse() != nil:
		now := immediate(msg.GetImmediateResponse())
		now.Destination, now.Sent = p.destination, p.body
		return now, nil
	case msg.GetResponseHeaders() == nil:
		return nil, fmt.Errorf("ext_proc response headers answer: unexpected %T", msg.GetResponse())
	}
	for _, o := range msg.GetResponseHeaders().GetResponse().GetHeaderMutation().GetSetHeaders() {
		reply.Header.Set(o.GetHeader().GetKey(), string(o.GetHeader().GetRawValue()))
	}
	if x.g.opts.Response == Duplex {
		return reply, x.exchangeBody(a.resp.Body, reply)
	}
	if err := x.read(a.resp.Body, reply); err != nil {
		return reply, err
	}
	x.over()
	return reply, nil
}

// read reads the response while the picker may still cut it.
func (x *exchange) read(body io.Reader, reply *Reply) error {
	done := make(chan error, 1)
	var buf bytes.Buffer
	go func() {
		_, err := buf.ReadFrom(body)
		done <- err
	}()
	select {
	case err := <-done:
		reply.Body, reply.Cut = buf.Bytes(), err != nil
		if x.ctx.Err() != nil {
			return context.Cause(x.ctx)
		}
		return nil
	case r := <-x.inbox:
		x.ended = r.err != nil
		if x.ctx.Err() != nil {
			return context.Cause(x.ctx)
		}
		reply.Cut = true
		if errors.Is(r.err, io.EOF) { // ended with OK: the response flows on
			err := <-done
			reply.Body, reply.Cut = buf.Bytes(), err != nil
		}
		return nil
	}
}

// exchangeBody passes every chunk of the response through the picker.
func (x *exchange) exchangeBody(body io.Reader, reply *Reply) error {
	chunk := make([]byte, chunkBytes)
	for over := false; !over; {
		n, err := body.Read(chunk)
		over = err != nil
		reply.Cut = over && !errors.Is(err, io.EOF)
		if reply.Cut {
			return nil
		}
		if err := x.stream.Send(responseBody(append([]byte(nil), chunk[:n]...), over)); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("ext_proc response body: %w", err)
		}
		msg, err := x.next()
		if err != nil {
			reply.Cut = true
			if x.ctx.Err() != nil {
				return context.Cause(x.ctx)
			}
			return nil
		}
		part := msg.GetResponseBody().GetResponse().GetBodyMutation().GetStreamedResponse()
		if part == nil {
			return fmt.Errorf("ext_proc response body answer: unexpected %T", msg.GetResponse())
		}
		reply.Body = append(reply.Body, part.GetBody()...)
	}
	x.over()
	return nil
}
