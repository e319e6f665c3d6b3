// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"encoding/json"
	"errors"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/baton-epp/baton/admission"
	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar"
)

// Errors of this package.
var (
	errBodyTooLarge = errors.New("request body too large")
	errProtocol     = errors.New("unexpected ext_proc message")
	errPanic        = errors.New("internal error")
	errShuttingDown = errors.New("the picker is shutting down")
)

// status is how an error is answered. The reason is a metric label and the value of x-llm-d-request-dropped-reason.
type status struct {
	code       int
	reason     string
	kind       string // error.type in OpenAI's error object
	anthropic  string // error.type in Anthropic's
	retryAfter string // seconds, "" for none
	hide       bool   // the client gets the reason only; the text is for the log
}

// statuses is the one table from errors to HTTP. The first match of errors.Is wins; what is not here is a 500.
var statuses = []struct {
	err error
	status
}{
	{inference.ErrMalformed, status{code: 400, reason: "malformed-body", kind: "BadRequestError", anthropic: "invalid_request_error"}},
	{sidecar.ErrNotCarried, status{code: 400, reason: "not-disaggregable", kind: "BadRequestError", anthropic: "invalid_request_error"}},
	{errBodyTooLarge, status{code: 413, reason: "body-too-large", kind: "RequestEntityTooLargeError", anthropic: "request_too_large"}},
	{director.ErrEncoding, status{code: 415, reason: "unsupported-encoding", kind: "UnsupportedMediaTypeError", anthropic: "invalid_request_error"}},
	{director.ErrBodyMode, status{code: 500, reason: "body-mode-unsafe", kind: "InternalServerError", anthropic: "api_error"}},
	{admission.ErrOverBudget, status{code: 429, reason: "rejected-saturated", kind: "RateLimitError", anthropic: "rate_limit_error", retryAfter: "1"}},
	{scheduler.ErrNoCandidate, status{code: 503, reason: "rejected-no-endpoints", kind: "ServiceUnavailableError", anthropic: "overloaded_error"}},
	{errShuttingDown, status{code: 503, reason: "rejected-shutting-down", kind: "ServiceUnavailableError", anthropic: "overloaded_error", retryAfter: "1"}},
	{sidecar.ErrBudgetSpent, status{code: 504, reason: "budget-spent", kind: "GatewayTimeoutError", anthropic: "api_error"}},
	{sidecar.ErrLooped, status{code: 508, reason: "loop-detected", kind: "BadRequestError", anthropic: "invalid_request_error"}},
}

// prefillFailed and encodeFailed answer a *sidecar.PhaseError.
var (
	prefillFailed = status{code: 502, reason: "prefill-failed", kind: "BadGatewayError", anthropic: "api_error", hide: true}
	encodeFailed  = status{code: 502, reason: "encode-failed", kind: "BadGatewayError", anthropic: "api_error", hide: true}
)

// internal answers whatever the table does not know.
var internal = status{code: 500, reason: "internal-error", kind: "InternalServerError", anthropic: "api_error", hide: true}

// statusOf finds the answer to an error.
func statusOf(err error) status {
	for i := range statuses {
		if errors.Is(err, statuses[i].err) {
			return statuses[i].status
		}
	}
	if phase, ok := errors.AsType[*sidecar.PhaseError](err); ok {
		if phase.Phase == scheduler.PhaseEncode {
			return encodeFailed
		}
		return prefillFailed
	}
	return internal
}

// immediateAnswer ends the request here, with a body in the format of the path's API.
func immediateAnswer(s status, err error, api inference.API) *extprocv3.ProcessingResponse {
	text := err.Error()
	if s.hide {
		text = s.reason
	}
	headers := []*corev3.HeaderValueOption{option("content-type", "application/json"), option(HeaderReason, s.reason)}
	if s.retryAfter != "" {
		headers = append(headers, option("retry-after", s.retryAfter))
	}
	return &extprocv3.ProcessingResponse{Response: &extprocv3.ProcessingResponse_ImmediateResponse{ImmediateResponse: &extprocv3.ImmediateResponse{
		Status:  &typev3.HttpStatus{Code: typev3.StatusCode(s.code)}, //nolint:gosec // codes of the table above
		Headers: &extprocv3.HeaderMutation{SetHeaders: headers},
		Body:    errorBody(s, text, api),
		Details: s.reason,
	}}}
}

// openAIError and anthropicError are the error objects of the two API families.
type (
	openAIError struct {
		Error openAIDetail `json:"error"`
	}
	openAIDetail struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    int     `json:"code"`
	}
	anthropicError struct {
		Type  string          `json:"type"`
		Error anthropicDetail `json:"error"`
	}
	anthropicDetail struct {
		Type    string `json:"type"`
		Message string `json:"message"`
	}
)

func errorBody(s status, text string, api inference.API) []byte {
	var v any = openAIError{Error: openAIDetail{Message: text, Type: s.kind, Code: s.code}}
	if api == inference.Messages {
		v = anthropicError{Type: "error", Error: anthropicDetail{Type: s.anthropic, Message: text}}
	}
	body, err := json.Marshal(v)
	if err != nil {
		return []byte(`{"error":{"message":"internal error","type":"InternalServerError","param":null,"code":500}}`)
	}
	return body
}
