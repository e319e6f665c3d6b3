// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"net/http"
)

// flatError is the error object of SGLang's and TensorRT-LLM's OpenAI routes.
type flatError struct {
	Object  string  `json:"object"`
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"`
	Code    int     `json:"code"`
}

// nativeError is the error object of SGLang's /generate, and what SGLang's streams carry.
type nativeError struct {
	Error any `json:"error"`
}

// errorBody is an error's JSON as the engine that serves x writes it.
func (x *exchange) errorBody(e *apiError) json.RawMessage {
	engine := x.p.e.opts.Engine
	switch {
	case engine != engineSGLang && engine != engineTRTLLM, x.api == apiMessages && !e.plain:
		return e.body(x.api)
	case x.api == apiNative:
		return marshal(nativeError{struct {
			Message string `json:"message"`
		}{e.message}})
	}
	return marshal(e.flat())
}

// errorEvent is the same in a stream that has begun.
func (x *exchange) errorEvent(e *apiError) json.RawMessage {
	if x.p.e.opts.Engine == engineSGLang && x.api != apiNative && x.api != apiMessages {
		return marshal(nativeError{e.flat()})
	}
	return x.errorBody(e)
}

func (e *apiError) flat() flatError {
	v := flatError{Object: "error", Message: e.message, Type: e.kind, Code: e.status}
	if e.param != "" {
		v.Param = &e.param
	}
	return v
}

// context ends when the request's work is to end.
func (x *exchange) context() context.Context {
	if x.ctx != nil {
		return x.ctx
	}
	return x.r.Context()
}

// sglangRoute finds the handlers that only SGLang has.
func sglangRoute(path string) *route {
	switch path {
	case "/generate":
		return &route{http.MethodPost, apiNative, (*process).generate}
	case "/abort_request":
		return &route{http.MethodPost, apiNative, (*process).serveAbort}
	case "/health_generate":
		return &route{http.MethodGet, apiNative, (*process).serveHealth}
	case "/get_model_info", "/model_info":
		return &route{http.MethodGet, apiNative, (*process).serveModelInfo}
	}
	return nil
}
