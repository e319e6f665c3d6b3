// SPDX-License-Identifier: Apache-2.0

// Package extproc speaks envoy.service.ext_proc.v3.ExternalProcessor: one gRPC stream per HTTP request. Its one type is
// the [Server]. It collects headers and body chunks in whatever body mode the gateway announces, asks the director, and
// turns the answer (or the error, by the table in status.go) into messages; in the response phase it echoes what it is
// shown and tells the director when the request is over. Every rule that looks odd here was measured on a real Envoy
// 1.40. Floor 5; the only package that knows go-control-plane.
package extproc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	"github.com/baton-epp/baton/admission"
	"github.com/baton-epp/baton/director"
)

// Names of the protocol (reference: Endpoint Picker Protocol).
const (
	// HeaderDestination names the picked endpoint, in the request header and in the metadata (P7).
	HeaderDestination = "x-gateway-destination-endpoint"
	// KeyServed is the metadata key under which the gateway reports who served (P13).
	KeyServed = "x-gateway-destination-endpoint-served"
	// NamespaceDestination is the dynamic metadata namespace of the pick and of the served endpoint.
	NamespaceDestination = "envoy.lb"
	// NamespaceSubset and KeySubset hold the gateway's subset hint (P3).
	NamespaceSubset = "envoy.lb.subset_hint"
	KeySubset       = "x-gateway-destination-endpoint-subset"
	// HeaderReason tells the client why it was refused (llm-d's name).
	HeaderReason = "x-llm-d-request-dropped-reason"
	// HeaderOutcome tells the client what came before decode.
	HeaderOutcome = "x-baton-outcome"
)

// Windows of the gRPC server, in bytes: one stream may have a whole large prompt in flight, and the connection that
// carries a thousand of them must not starve any.
const (
	streamWindow     = 1 << 20
	connectionWindow = 16 << 20
	// maxStreams is far above what a gateway holds open on one connection (Envoy itself stops at 1,024 by default).
	maxStreams = 1 << 20
	// messageOverhead is what a message may hold beside a body of the largest size.
	messageOverhead = 1 << 20
)

// Options are a server's collaborators and limits; all are required but the booleans.
type Options struct {
	Director *director.Director
	Gate     *admission.Gate
	// MaxBodyBytes is limits.maxBodyBytes: one request's body, 413 above.
	MaxBodyBytes int64
	// OverrideTimeout is what a BUFFERED gateway is asked to wait for a prefill (disaggregation.budget).
	OverrideTimeout func() time.Duration
	// HoldResponse is how long the head of a response may wait for a prefill that still runs beside decode
	// (disaggregation.holdResponse).
	HoldResponse func() time.Duration
	// IgnoreSubset is --disable-endpoint-subset-filter.
	IgnoreSubset bool
	Logger       *slog.Logger
	Registerer   prometheus.Registerer
}

// Server answers ext_proc streams. Safe for concurrent use.
type Server struct {
	extprocv3.UnimplementedExternalProcessorServer
	opts    Options
	log     *slog.Logger
	metrics *metrics

	gateways gateways

	drainOnce sync.Once
	draining  chan struct{}   // closed: quiet streams whose response headers were answered end with OK
	cutting   context.Context //nolint:containedctx // ends with Cut: every quiet stream ends with OK, held phases with 503
	cut       context.CancelFunc
}

// New checks that every collaborator is there.
func New(o Options) (*Server, error) {
	if o.Director == nil || o.Gate == nil || o.Logger == nil || o.Registerer == nil || o.OverrideTimeout == nil || o.HoldResponse == nil {
		return nil, errors.New("extproc: Options: Director, Gate, OverrideTimeout, HoldResponse, Logger and Registerer are required")
	}
	if o.MaxBodyBytes <= 0 {
		return nil, fmt.Errorf("limits.maxBodyBytes: %d, must be above 0", o.MaxBodyBytes)
	}
	s := &Server{
		opts: o, log: o.Logger.With(slog.String("component", "extproc")), metrics: newMetrics(o.Registerer), draining: make(chan struct{}),
	}
	s.cutting, s.cut = context.WithCancel(context.Background())
	return s, nil
}

// ServerOptions are the gRPC options that fit this server: sizes, windows and stream limits. maxRecv and maxSend are
// --grpc-max-recv-msg-size and --grpc-max-send-msg-size in bytes; 0 fits them to the body limit.
func (s *Server) ServerOptions(maxRecv, maxSend int) []grpc.ServerOption {
	if maxRecv <= 0 {
		maxRecv = int(s.opts.MaxBodyBytes) + messageOverhead
	}
	if maxSend <= 0 {
		maxSend = int(s.opts.MaxBodyBytes) + messageOverhead
	}
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxRecv), grpc.MaxSendMsgSize(maxSend), grpc.MaxConcurrentStreams(maxStreams),
		grpc.InitialWindowSize(streamWindow), grpc.InitialConnWindowSize(connectionWindow),
		// A gateway that died without a word is noticed within a minute, so that its streams do not hold load for ever.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// Register makes g answer ext_proc calls by this server.
func (s *Server) Register(g *grpc.Server) { extprocv3.RegisterExternalProcessorServer(g, s) }

// Drain begins the end: quiet streams whose response headers were answered are ended with OK, which loses nothing.
func (s *Server) Drain() { s.drainOnce.Do(func() { close(s.draining) }) }

// Cut ends what Drain left and can be ended without loss, and answers requests that are still held with 503; call it when
// the drain time is over, before the gRPC server is stopped.
func (s *Server) Cut() {
	s.Drain()
	s.cut()
}

// Abort is told that the gRPC server is about to be stopped: it counts the streams that this cuts, and returns how many.
func (s *Server) Abort() int64 {
	left := s.Streams()
	s.metrics.cut.Add(float64(left))
	return left
}

// Streams is the number of streams open now.
func (s *Server) Streams() int64 { return s.metrics.open.Load() }

// Process handles one HTTP request. It returns nil for everything that was answered: a gRPC error would hand the
// decision to the gateway's failure mode.
func (s *Server) Process(grpcStream extprocv3.ExternalProcessor_ProcessServer) (err error) {
	st := &stream{server: s, grpc: grpcStream, start: time.Now()}
	s.metrics.opened()
	defer func() {
		if r := recover(); r != nil {
			err = st.recovered(r, debug.Stack())
		}
		st.close()
		s.metrics.closed()
	}()
	return st.run()
}
