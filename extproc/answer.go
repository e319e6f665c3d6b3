// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"slices"
	"strconv"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/inference"
)

// Answers without content are the same for every request; messages are never changed after they were made.
var (
	requestHeadersPass     = &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_RequestHeaders{RequestHeaders: &extprocv3.HeadersResponse{}}}
	requestBodyPass        = &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_RequestBody{RequestBody: &extprocv3.BodyResponse{}}}
	requestTrailersAnswer  = &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_RequestTrailers{RequestTrailers: &extprocv3.TrailersResponse{}}}
	responseBodyPass       = &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseBody{ResponseBody: &extprocv3.BodyResponse{}}}
	responseTrailersAnswer = &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseTrailers{ResponseTrailers: &extprocv3.TrailersResponse{}}}
	responseHeadersPass    = &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseHeaders{ResponseHeaders: &extprocv3.HeadersResponse{}}}
	responseDisaggregated  = outcomeAnswer("disaggregated")
	responseAggregated     = outcomeAnswer("aggregated")
)

// option sets a header, replacing whatever the client sent.
func option(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: name, RawValue: []byte(value)},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}

// mutation is the change of the request's headers: the pick, what travels with it, and the removal of what the client
// may not send. A changed length is removed, never guessed: a stale one would smuggle the surplus into the next request.
func mutation(a *director.Answer, control []string, dropLength bool) *extprocv3.HeaderMutation {
	m := &extprocv3.HeaderMutation{SetHeaders: make([]*corev3.HeaderValueOption, 0, 1+len(a.Set)), RemoveHeaders: control}
	m.SetHeaders = append(m.SetHeaders, option(HeaderDestination, a.Destination))
	for _, h := range a.Set {
		m.SetHeaders = append(m.SetHeaders, option(h.Name, h.Value))
	}
	if len(control) > 0 {
		m.RemoveHeaders = withoutSet(control, a)
	}
	if dropLength {
		m.RemoveHeaders = append(slices.Clip(m.GetRemoveHeaders()), "content-length")
	}
	return m
}

// withoutSet leaves out the names that are set anyway: overwriting is their removal.
func withoutSet(control []string, a *director.Answer) []string {
	kept := make([]string, 0, len(control)+1)
	for _, name := range control {
		set := name == HeaderDestination
		for _, h := range a.Set {
			set = set || h.Name == name
		}
		if !set {
			kept = append(kept, name)
		}
	}
	return kept
}

// metadata repeats the pick where proxies read it (P7, P10).
func metadata(a *director.Answer) *structpb.Struct {
	pick := &structpb.Struct{Fields: map[string]*structpb.Value{HeaderDestination: structpb.NewStringValue(a.Destination)}}
	return &structpb.Struct{Fields: map[string]*structpb.Value{NamespaceDestination: structpb.NewStructValue(pick)}}
}

// headersAnswer is the answer on the request headers, in every mode but BUFFERED with a body.
func headersAnswer(a *director.Answer, control []string, bodyChanged bool) *extprocv3.ProcessingResponse {
	return &extprocv3.ProcessingResponse{
		Response: &extprocv3.ProcessingResponse_RequestHeaders{RequestHeaders: &extprocv3.HeadersResponse{
			Response: &extprocv3.CommonResponse{HeaderMutation: mutation(a, control, bodyChanged)},
		}},
		DynamicMetadata: metadata(a),
	}
}

// bufferedAnswer is the whole answer on the one body message of BUFFERED mode. There Envoy checks the length against the
// new body and refuses a mismatch, so the exact one is set.
func bufferedAnswer(a *director.Answer, control []string) *extprocv3.ProcessingResponse {
	common := &extprocv3.CommonResponse{HeaderMutation: mutation(a, control, false)}
	if a.Body != nil {
		body := make([]byte, 0, a.Body.Len())
		for _, c := range a.Body.Chunks() {
			body = append(body, c...)
		}
		common.BodyMutation = &extprocv3.BodyMutation{Mutation: &extprocv3.BodyMutation_Body{Body: body}}
		common.HeaderMutation.SetHeaders = append(common.HeaderMutation.SetHeaders, option("content-length", strconv.Itoa(len(body))))
	}
	return &extprocv3.ProcessingResponse{
		Response:        &extprocv3.ProcessingResponse_RequestBody{RequestBody: &extprocv3.BodyResponse{Response: common}},
		DynamicMetadata: metadata(a),
	}
}

// overrideTimeout asks the gateway to wait for the answer to its last message (only once per message, and only where
// max_message_timeout allows it).
func overrideTimeout(d time.Duration) *extprocv3.ProcessingResponse {
	return &extprocv3.ProcessingResponse{OverrideMessageTimeout: durationpb.New(d)}
}

func streamedRequestBody(chunk []byte, last bool) *extprocv3.ProcessingResponse {
	return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_RequestBody{RequestBody: streamedBody(chunk, last)}}
}

func streamedResponseBody(chunk []byte, last bool) *extprocv3.ProcessingResponse {
	return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseBody{ResponseBody: streamedBody(chunk, last)}}
}

// replacedResponseBody replaces the message's body where bodies are STREAMED or BUFFERED; nil bytes would leave it as it is.
func replacedResponseBody(body []byte) *extprocv3.ProcessingResponse {
	mutation := &extprocv3.BodyMutation{Mutation: &extprocv3.BodyMutation_Body{Body: body}}
	if len(body) == 0 {
		mutation.Mutation = &extprocv3.BodyMutation_ClearBody{ClearBody: true}
	}
	return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseBody{ResponseBody: &extprocv3.BodyResponse{
		Response: &extprocv3.CommonResponse{BodyMutation: mutation},
	}}}
}

func streamedBody(chunk []byte, last bool) *extprocv3.BodyResponse {
	return &extprocv3.BodyResponse{Response: &extprocv3.CommonResponse{BodyMutation: &extprocv3.BodyMutation{
		Mutation: &extprocv3.BodyMutation_StreamedResponse{StreamedResponse: &extprocv3.StreamedBodyResponse{Body: chunk, EndOfStream: last}},
	}}}
}

// responseHeadersAnswer lets the response headers pass, with the outcome beside them.
func responseHeadersAnswer(a *director.Answer) *extprocv3.ProcessingResponse {
	switch {
	case a == nil:
		return responseHeadersPass
	case len(a.ResponseSet) == 0 && a.Outcome == "disaggregated":
		return responseDisaggregated
	case len(a.ResponseSet) == 0 && a.Outcome == "aggregated":
		return responseAggregated
	default:
		return outcomeAnswer(a.Outcome, a.ResponseSet...)
	}
}

func outcomeAnswer(outcome string, more ...inference.Header) *extprocv3.ProcessingResponse {
	set := make([]*corev3.HeaderValueOption, 0, 1+len(more))
	set = append(set, option(HeaderOutcome, outcome))
	for _, h := range more {
		set = append(set, option(h.Name, h.Value))
	}
	return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ResponseHeaders{ResponseHeaders: &extprocv3.HeadersResponse{
		Response: &extprocv3.CommonResponse{HeaderMutation: &extprocv3.HeaderMutation{SetHeaders: set}},
	}}}
}
