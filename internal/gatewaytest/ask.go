// SPDX-License-Identifier: Apache-2.0

package gatewaytest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"

	"github.com/baton-epp/baton/extproc"
)

// pick is the picker's answer to a request.
type pick struct {
	destination string
	header      http.Header
	body        []byte
	immediate   *Reply
}

// ask sends the request's headers and body and reads the answer.
func (x *exchange) ask(path string, body []byte, header http.Header) (*pick, error) {
	first := requestHeaders(path, header, len(body) == 0)
	first.ProtocolConfig = &extprocv3.ProtocolConfiguration{RequestBodyMode: x.g.opts.Request, ResponseBodyMode: x.g.opts.Response}
	if err := x.stream.Send(first); err != nil {
		return nil, fmt.Errorf("ext_proc headers: %w", err)
	}
	p := &pick{header: header.Clone(), body: body}
	if x.g.opts.Request == Buffered {
		return p, x.askBuffered(p, body)
	}
	return p, x.askDuplex(p, body)
}

// chunkBytes is what one body message of Envoy carries at most, roughly.
const chunkBytes = 64 << 10

func (x *exchange) askDuplex(p *pick, body []byte) error {
	for rest := body; ; {
		n := min(len(rest), chunkBytes)
		last := n == len(rest)
		if err := x.stream.Send(requestBody(rest[:n], last)); err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("ext_proc body: %w", err)
		}
		if rest = rest[n:]; last {
			break
		}
	}
	var sent bytes.Buffer
	for {
		msg, err := x.next()
		if err != nil {
			return fmt.Errorf("ext_proc answer: %w", err)
		}
		switch m := msg.GetResponse().(type) {
		case *extprocv3.ProcessingResponse_ImmediateResponse:
			p.immediate = immediate(m.ImmediateResponse)
			return nil
		case *extprocv3.ProcessingResponse_RequestHeaders:
			p.apply(m.RequestHeaders.GetResponse(), msg)
		case *extprocv3.ProcessingResponse_RequestBody:
			part := m.RequestBody.GetResponse().GetBodyMutation().GetStreamedResponse()
			sent.Write(part.GetBody())
			if part.GetEndOfStream() {
				p.body = sent.Bytes()
				return nil
			}
		default:
			return fmt.Errorf("ext_proc answer: unexpected %T", m)
		}
	}
}

func (x *exchange) askBuffered(p *pick, body []byte) error {
	for sent := false; ; {
		msg, err := x.next()
		if err != nil {
			return fmt.Errorf("ext_proc answer: %w", err)
		}
		switch m := msg.GetResponse().(type) {
		case nil: // asks for time
		case *extprocv3.ProcessingResponse_ImmediateResponse:
			p.immediate = immediate(m.ImmediateResponse)
			return nil
		case *extprocv3.ProcessingResponse_RequestHeaders:
			if sent {
				return errors.New("ext_proc answer: headers answered twice")
			}
			if err := x.stream.Send(requestBody(body, true)); err != nil {
				return fmt.Errorf("ext_proc body: %w", err)
			}
			sent = true
		case *extprocv3.ProcessingResponse_RequestBody:
			p.apply(m.RequestBody.GetResponse(), msg)
			if changed, ok := m.RequestBody.GetResponse().GetBodyMutation().GetMutation().(*extprocv3.BodyMutation_Body); ok {
				p.body = changed.Body
			}
			return nil
		default:
			return fmt.Errorf("ext_proc answer: unexpected %T", m)
		}
	}
}

// apply takes over header changes and the destination, which only the metadata may name.
func (p *pick) apply(c *extprocv3.CommonResponse, msg *extprocv3.ProcessingResponse) {
	for _, name := range c.GetHeaderMutation().GetRemoveHeaders() {
		p.header.Del(name)
	}
	for _, o := range c.GetHeaderMutation().GetSetHeaders() {
		p.header.Set(o.GetHeader().GetKey(), string(o.GetHeader().GetRawValue()))
	}
	ns := msg.GetDynamicMetadata().GetFields()[extproc.NamespaceDestination].GetStructValue()
	if d := ns.GetFields()[extproc.HeaderDestination].GetStringValue(); d != "" {
		p.destination, _, _ = strings.Cut(d, ",")
	}
}
