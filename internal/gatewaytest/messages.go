// SPDX-License-Identifier: Apache-2.0

package gatewaytest

import (
	"net/http"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/baton-epp/baton/extproc"
)

func requestHeaders(path string, header http.Header, over bool) *extprocv3.ProcessingRequest {
	h := &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
		pair(":method", http.MethodPost), pair(":path", path), pair(":authority", "models.test"), pair(":scheme", "http"),
	}}
	for name, values := range header {
		for _, v := range values {
			h.Headers = append(h.Headers, pair(strings.ToLower(name), v))
		}
	}
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestHeaders{
		RequestHeaders: &extprocv3.HttpHeaders{Headers: h, EndOfStream: over},
	}}
}

func pair(name, value string) *corev3.HeaderValue {
	return &corev3.HeaderValue{Key: name, RawValue: []byte(value)}
}

func requestBody(chunk []byte, over bool) *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestBody{
		RequestBody: &extprocv3.HttpBody{Body: chunk, EndOfStream: over},
	}}
}

func responseBody(chunk []byte, over bool) *extprocv3.ProcessingRequest {
	return &extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_ResponseBody{
		ResponseBody: &extprocv3.HttpBody{Body: chunk, EndOfStream: over},
	}}
}

// responseHeaders shows status and headers, who served, and how the response came about.
func responseHeaders(resp *http.Response, served, details string) *extprocv3.ProcessingRequest {
	h := &corev3.HeaderMap{Headers: []*corev3.HeaderValue{pair(":status", strconv.Itoa(resp.StatusCode))}}
	for name, values := range resp.Header {
		for _, v := range values {
			h.Headers = append(h.Headers, pair(strings.ToLower(name), v))
		}
	}
	return &extprocv3.ProcessingRequest{
		Request: &extprocv3.ProcessingRequest_ResponseHeaders{ResponseHeaders: &extprocv3.HttpHeaders{Headers: h}},
		Attributes: map[string]*structpb.Struct{
			"envoy.filters.http.ext_proc": {Fields: map[string]*structpb.Value{"response.code_details": structpb.NewStringValue(details)}},
		},
		MetadataContext: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
			extproc.NamespaceDestination: {Fields: map[string]*structpb.Value{extproc.KeyServed: structpb.NewStringValue(served)}},
		}},
	}
}

// immediate reads an answer that the picker makes itself.
func immediate(m *extprocv3.ImmediateResponse) *Reply {
	r := &Reply{Status: int(m.GetStatus().GetCode()), Header: http.Header{}, Body: m.GetBody(), Immediate: true}
	for _, o := range m.GetHeaders().GetSetHeaders() {
		r.Header.Set(o.GetHeader().GetKey(), string(o.GetHeader().GetRawValue()))
	}
	return r
}
