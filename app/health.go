// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"sync"

	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// The health names of the protocol (P14–P16), the empty one, and the one that lwepp's probes use.
const (
	healthLiveness  = "liveness"
	healthReadiness = "readiness"
	healthExtProc   = "envoy.service.ext_proc.v3.ExternalProcessor"
	healthLWEPP     = "inference-extension"
)

// health answers grpc.health.v1 with Check, List and Watch. Liveness is SERVING whenever the process answers; the other
// names are SERVING while the pool has synced and no drain has begun. Safe for concurrent use.
type health struct {
	healthv1.UnimplementedHealthServer
	mu      sync.Mutex
	ready   bool          // guarded by mu
	drained bool          // guarded by mu; nothing makes a draining picker ready again
	changed chan struct{} // guarded by mu; closed and replaced at each change
}

func newHealth() *health { return &health{changed: make(chan struct{})} }

// set tells whether requests are welcome.
func (h *health) set(ready bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ready == ready || h.drained {
		return
	}
	h.ready = ready
	close(h.changed)
	h.changed = make(chan struct{})
}

// drain turns every name but liveness to NOT_SERVING for good, and ends the watches: they would hold up the drain.
func (h *health) drain() {
	h.set(false)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drained = true
	close(h.changed)
	h.changed = make(chan struct{})
}

// draining reports whether the drain has begun.
func (h *health) draining() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.drained
}

// status of a name, and a channel that is closed at the next change.
func (h *health) status(service string) (healthv1.HealthCheckResponse_ServingStatus, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch service {
	case healthLiveness:
		return healthv1.HealthCheckResponse_SERVING, h.changed
	case healthReadiness, healthExtProc, healthLWEPP, "":
		if h.ready {
			return healthv1.HealthCheckResponse_SERVING, h.changed
		}
		return healthv1.HealthCheckResponse_NOT_SERVING, h.changed
	default:
		return healthv1.HealthCheckResponse_SERVICE_UNKNOWN, h.changed
	}
}

// Check answers one question; an unknown name is NOT_FOUND, as grpc.health.v1 demands.
func (h *health) Check(_ context.Context, req *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	s, _ := h.status(req.GetService())
	if s == healthv1.HealthCheckResponse_SERVICE_UNKNOWN {
		return nil, status.Errorf(codes.NotFound, "unknown service %.100q; known: liveness, readiness, %s, %s", req.GetService(), healthExtProc, healthLWEPP)
	}
	return &healthv1.HealthCheckResponse{Status: s}, nil
}

// List answers for all names.
func (h *health) List(context.Context, *healthv1.HealthListRequest) (*healthv1.HealthListResponse, error) {
	all := map[string]*healthv1.HealthCheckResponse{}
	for _, name := range []string{"", healthLiveness, healthReadiness, healthExtProc, healthLWEPP} {
		s, _ := h.status(name)
		all[name] = &healthv1.HealthCheckResponse{Status: s}
	}
	return &healthv1.HealthListResponse{Statuses: all}, nil
}

// Watch tells the status now and at each change.
func (h *health) Watch(req *healthv1.HealthCheckRequest, stream healthv1.Health_WatchServer) error {
	last := healthv1.HealthCheckResponse_UNKNOWN
	for {
		s, changed := h.status(req.GetService())
		if s != last {
			if err := stream.Send(&healthv1.HealthCheckResponse{Status: s}); err != nil {
				return err
			}
			last = s
		}
		if h.draining() {
			return nil
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}
