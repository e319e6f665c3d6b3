// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Fields of ProcessingResponse and of the messages in it.
const (
	fieldRequestHeaders  = 1
	fieldResponseHeaders = 2
	fieldRequestBody     = 3
	fieldResponseBody    = 4
	fieldImmediate       = 7

	fieldResponse     = 1 // of BodyResponse
	fieldBodyMutation = 3 // of CommonResponse
	fieldStreamed     = 3 // of BodyMutation
	fieldBody         = 1 // of StreamedBodyResponse
	fieldEndOfStream  = 2 // of StreamedBodyResponse
)

// answer is what the load needs of a message from the server. Bodies are measured where they lie: decoding them would
// cost the client as much as the server's work that is to be measured.
type answer struct {
	kind    protowire.Number // which answer, one of the fields of ProcessingResponse
	bytes   int              // of a body
	over    bool             // end_of_stream of a body
	headers *extprocv3.ProcessingResponse
}

// rawCodec sends messages that were encoded before and receives into an answer.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(encoded)
	if !ok {
		return nil, fmt.Errorf("send %T, want encoded", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(m)}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	a, ok := v.(*answer)
	if !ok {
		return fmt.Errorf("receive into %T, want *answer", v)
	}
	whole := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer whole.Free()
	return a.read(whole.ReadOnlyData())
}

var _ encoding.CodecV2 = rawCodec{}

var errWire = errors.New("not a ProcessingResponse")

// read fills a from an encoded ProcessingResponse, of which it keeps nothing.
func (a *answer) read(message []byte) error {
	*a = answer{}
	body := message
	for rest := message; len(rest) > 0; {
		num, value, n := field(rest)
		if n < 0 {
			return errWire
		}
		rest = rest[n:]
		if num <= fieldImmediate {
			a.kind, body = num, value
		}
	}
	switch a.kind {
	case fieldRequestBody, fieldResponseBody:
		return a.readBody(body)
	case fieldRequestHeaders, fieldImmediate:
		a.headers = &extprocv3.ProcessingResponse{}
		return proto.Unmarshal(message, a.headers)
	default:
		return nil
	}
}

// readBody walks BodyResponse → CommonResponse → BodyMutation → StreamedBodyResponse.
func (a *answer) readBody(message []byte) error {
	for _, want := range []protowire.Number{fieldResponse, fieldBodyMutation, fieldStreamed} {
		var found bool
		for rest := message; len(rest) > 0 && !found; {
			num, value, n := field(rest)
			if n < 0 {
				return errWire
			}
			rest = rest[n:]
			if num == want {
				message, found = value, true
			}
		}
		if !found {
			return fmt.Errorf("%w: a body answer without a streamed response", errWire)
		}
	}
	for len(message) > 0 {
		num, value, n := field(message)
		if n < 0 {
			return errWire
		}
		message = message[n:]
		if num == fieldBody {
			a.bytes = len(value)
		}
		if num == fieldEndOfStream {
			a.over = len(value) == 1 && value[0] == 1
		}
	}
	return nil
}

// field reads one field: the payload of a length-delimited one, the raw bytes of any other; n is negative when there is
// none.
func field(b []byte) (num protowire.Number, value []byte, n int) {
	num, kind, head := protowire.ConsumeTag(b)
	if head < 0 {
		return 0, nil, head
	}
	if kind == protowire.BytesType {
		value, n = protowire.ConsumeBytes(b[head:])
	} else if n = protowire.ConsumeFieldValue(num, kind, b[head:]); n >= 0 {
		value = b[head : head+n]
	}
	if n < 0 {
		return 0, nil, n
	}
	return num, value, head + n
}
