// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

// encoded is a message as it goes on the wire. It must not change once it was handed to gRPC.
type encoded []byte

// script is what a gateway sends for one HTTP request, encoded up front: the load must cost less than what it measures.
type script struct {
	request   []encoded // headers, then body pieces
	marks     []mark    // where the marker is, which is different in each request
	bodyBytes int
	chunks    []encoded // response body messages, the last one empty with end_of_stream; none in quiet mode
	echoBytes int       // bytes in chunks
}

// mark is a place of the marker: the message and the byte in it.
type mark struct{ message, at int }

// newScript writes the messages that Envoy 1.40 sends: protocol_config on the first, the body in pieces of at most
// piece bytes with end_of_stream on the last, and in full-duplex mode each response event as a message of its own.
func newScript(group int, spec *loadSpec) (*script, error) {
	body, err := chatBody(group, spec.PromptBytes)
	if err != nil {
		return nil, err
	}
	s := &script{bodyBytes: len(body)}
	responseMode := modeNone
	if spec.FullDuplex {
		responseMode = modeDuplex
	}
	messages := []*extprocv3.ProcessingRequest{requestHeaders(len(body), responseMode)}
	for piece := range pieces(body, spec.Piece) {
		messages = append(messages, &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestBody{
			RequestBody: &extprocv3.HttpBody{Body: piece},
		}})
	}
	messages[len(messages)-1].GetRequestBody().EndOfStream = true
	if s.request, err = encode(messages); err != nil {
		return nil, err
	}
	for i, m := range s.request {
		if at := bytes.Index(m, []byte(marker)); at >= 0 {
			s.marks = append(s.marks, mark{message: i, at: at})
		}
	}
	if len(s.marks) != 2 {
		return nil, fmt.Errorf("marker in %d messages, want headers and one body piece", len(s.marks))
	}
	if spec.FullDuplex {
		s.chunks, s.echoBytes, err = responseChunks(spec.Chunks)
	}
	return s, err
}

// pieces cuts a body, but never through the marker.
func pieces(body []byte, size int) func(yield func([]byte) bool) {
	mark := bytes.Index(body, []byte(marker))
	return func(yield func([]byte) bool) {
		for start := 0; start < len(body); {
			end := min(start+size, len(body))
			if end > mark && end < mark+len(marker) {
				end = mark
			}
			if !yield(body[start:end]) {
				return
			}
			start = end
		}
	}
}

func responseChunks(n int) (chunks []encoded, total int, err error) {
	messages := make([]*extprocv3.ProcessingRequest, 0, n+1)
	for i := range n + 1 {
		var event []byte // the last message is empty: Envoy learns of the end after the last byte
		switch {
		case i == n-1:
			event = []byte(lastEvent)
		case i < n-1:
			event = tokenEvent(i)
		}
		total += len(event)
		messages = append(messages, &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseBody{
			ResponseBody: &extprocv3.HttpBody{Body: event, EndOfStream: i == n},
		}})
	}
	chunks, err = encode(messages)
	return chunks, total, err
}

func encode(messages []*extprocv3.ProcessingRequest) ([]encoded, error) {
	out := make([]encoded, 0, len(messages))
	for _, m := range messages {
		b, err := proto.Marshal(m)
		if err != nil {
			return nil, fmt.Errorf("encode: %w", err)
		}
		out = append(out, b)
	}
	return out, nil
}

// stamped returns the i-th request message with the marker replaced by stamp where it carries one.
func (s *script) stamped(i int, stamp []byte) encoded {
	m := s.request[i]
	for _, place := range s.marks {
		if place.message == i {
			m = slices.Clone(m)
			copy(m[place.at:], stamp)
		}
	}
	return m
}

// requestHeaders is the first message: the headers an OpenAI client sends through a gateway.
func requestHeaders(length int, response procv3.ProcessingMode_BodySendMode) *extprocv3.ProcessingRequest {
	headers := [][2]string{
		{":authority", "inference.example.com"},
		{":path", "/v1/chat/completions"},
		{":method", "POST"},
		{":scheme", "https"},
		{"accept", "application/json"},
		{"accept-encoding", "gzip, deflate"},
		{"authorization", "Bearer sk-bench-0123456789abcdef0123456789abcdef"},
		{"content-length", strconv.Itoa(length)},
		{"content-type", "application/json"},
		{"user-agent", "OpenAI/Python 2.8.1"},
		{"x-stainless-lang", "python"},
		{"x-stainless-package-version", "2.8.1"},
		{"x-stainless-runtime", "CPython"},
		{"traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"},
		{"x-forwarded-for", "10.1.2.3"},
		{"x-forwarded-proto", "https"},
		{"x-request-id", "b7ad6b71-6920-4331-9c80-" + marker},
	}
	return &extprocv3.ProcessingRequest{
		Request: &extprocv3.ProcessingRequest_RequestHeaders{RequestHeaders: &extprocv3.HttpHeaders{Headers: headerMap(headers)}},
		ProtocolConfig: &extprocv3.ProtocolConfiguration{
			RequestBodyMode: modeDuplex, ResponseBodyMode: response,
		},
		MetadataContext: &corev3.Metadata{},
	}
}

// responseHeaders tells that endpoint served.
func responseHeaders(endpoint string) (encoded, error) {
	headers := [][2]string{
		{":status", "200"},
		{"date", "Mon, 24 Nov 2025 12:00:00 GMT"},
		{"server", "uvicorn"},
		{"content-type", "text/event-stream; charset=utf-8"},
		{"transfer-encoding", "chunked"},
		{"x-envoy-upstream-service-time", "42"},
	}
	served := &structpb.Struct{Fields: map[string]*structpb.Value{keyServed: structpb.NewStringValue(endpoint)}}
	m, err := encode([]*extprocv3.ProcessingRequest{{
		Request:         &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extprocv3.HttpHeaders{Headers: headerMap(headers)}},
		MetadataContext: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{namespaceDestination: served}},
	}})
	if err != nil || len(m) != 1 {
		return nil, errors.Join(errors.New("response headers"), err)
	}
	return m[0], nil
}

func headerMap(headers [][2]string) *corev3.HeaderMap {
	m := &corev3.HeaderMap{}
	for _, h := range headers {
		m.Headers = append(m.Headers, &corev3.HeaderValue{Key: h[0], RawValue: []byte(h[1])})
	}
	return m
}
