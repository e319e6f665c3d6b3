// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
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

// newTracing sends spans by OTLP over gRPC, where and how often the OTEL_ variables say. It connects when the first span
// is due; Shutdown flushes and ends it.
func newTracing() (*sdktrace.TracerProvider, error) {
	exporter := otlptracegrpc.NewUnstarted()
	if err := exporter.Start(context.Background()); err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	return sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter, sdktrace.WithExportTimeout(5*time.Second))), nil
}
