// SPDX-License-Identifier: Apache-2.0

package director

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/inference"
)

// spanName is llm-d's name of the span around one request's orchestration.
const spanName = "gateway.request_orchestration"

// startSpan starts the request's span, a child of the client's or gateway's own where the W3C headers name one. Without
// a tracer nothing is done: the headers then travel on as they came.
func (x *Exchange) startSpan(ctx context.Context) context.Context {
	tracer := x.director.opts.Tracer
	if tracer == nil {
		return ctx
	}
	parent := propagation.TraceContext{}.Extract(ctx, carrier(x.req.Headers))
	//nolint:spancheck // Done ends it
	ctx, x.span = tracer.Start(parent, spanName, trace.WithSpanKind(trace.SpanKindServer), trace.WithTimestamp(x.start), trace.WithAttributes(
		attribute.String("request_id", x.req.ID), attribute.String("model", x.req.Model), attribute.Int("prompt_tokens", x.req.PromptTokens()),
	))
	return ctx
}

// endSpan says how the request went.
func (x *Exchange) endSpan() {
	if x.span == nil {
		return
	}
	if x.err != nil {
		x.span.SetStatus(codes.Error, x.err.Error())
	}
	if x.outcome != nil {
		x.span.SetAttributes(attribute.String("outcome", x.outcome.Name), attribute.String("endpoint", x.decode.ID()), attribute.Int("status", x.status))
	}
	x.span.End()
}

// carrier reads trace headers out of the request's.
type carrier inference.Headers

// Get implements propagation.TextMapCarrier; names are in lower case already.
func (c carrier) Get(key string) string { return inference.Headers(c).Get(key) }

// Set implements propagation.TextMapCarrier; the request's headers are never changed.
func (c carrier) Set(string, string) {}

// Keys implements propagation.TextMapCarrier.
func (c carrier) Keys() []string { return nil }
