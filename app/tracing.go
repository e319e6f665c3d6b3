// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// TracingConfigured reports whether the environment asks for traces: any OTEL_ variable but the one that switches it off.
func TracingConfigured() bool {
	if os.Getenv("OTEL_SDK_DISABLED") == "true" || os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return false
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "OTEL_EXPORTER_OTLP") || strings.HasPrefix(v, "OTEL_TRACES_EXPORTER=otlp") {
			return true
		}
	}
	return false
}

// startTracing sends spans by OTLP over gRPC, as the OTEL_ variables say; the returned function flushes and stops it.
func startTracing(ctx context.Context) (stop func(context.Context) error, err error) {
	exporter, err := otlptracegrpc.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter, sdktrace.WithExportTimeout(5*time.Second)))
	otel.SetTracerProvider(provider)
	otel.SetTextMapPropagator(propagation.TraceContext{})
	return provider.Shutdown, nil
}
