// SPDX-License-Identifier: Apache-2.0

// Package app wires the picker together and runs it: configuration, pool source, scraper, scheduler, orchestrator,
// director, the ext_proc server and the listeners for health and metrics. Its one type is the [App]; package main only
// maps flags to its [Options]. Floor 6.
package app

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/baton-epp/baton/admission"
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/datastore"
	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/extproc"
	"github.com/baton-epp/baton/metricsscraper"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar"
)

// App is a whole picker. New builds it, Run serves until its context ends.
type App struct {
	opts   Options
	log    *slog.Logger
	config *config.Config
	// configSum is the checksum of the configuration in force, for the watcher.
	configSum [sha256.Size]byte

	store        *datastore.Store
	scraper      *metricsscraper.Scraper
	scheduler    *scheduler.Scheduler
	orchestrator *sidecar.Orchestrator
	server       *extproc.Server
	registry     *prometheus.Registry
	decisions    *ring // nil without --enable-debug
	health       *health
	tracing      *sdktrace.TracerProvider // nil when nothing is traced
	heapFloor    []byte                   // kept only to be kept
	cert         *certificate             // nil without TLS

	endpoints       []endpoint // ext_proc: TCP first where there is one, then the socket
	healthServer    *grpc.Server
	metricsServer   *http.Server
	healthListener  net.Listener
	metricsListener net.Listener
}

// endpoint is one place where ext_proc is answered.
type endpoint struct {
	listener net.Listener
	server   *grpc.Server
}

// New reads the configuration, builds every part and opens the listeners; nothing is served yet. The error joins every
// problem; after an error nothing stays open.
func New(o Options) (*App, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	a := &App{opts: o, log: o.Logger.With(slog.String("component", "app")), registry: prometheus.NewRegistry(), health: newHealth()}
	for _, step := range []func() error{a.load, a.buildPool, a.buildRequestPath, a.buildServers, a.listen} {
		if err := step(); err != nil {
			a.closeListeners()
			return nil, err
		}
	}
	return a, nil
}

// load reads the configuration, or takes the default one.
func (a *App) load() error {
	a.config = config.Default()
	name, text, err := a.opts.readConfig()
	if err != nil {
		return err
	}
	if text != nil {
		if a.config, err = config.Load(name, text); err != nil {
			return err
		}
		a.configSum = sha256.Sum256(text)
	}
	a.warn(a.config.Warnings)
	a.warn(sidecar.Warnings(&a.config.Disaggregation))
	limit := memoryLimit()
	setMemoryLimit(limit)
	a.heapFloor = newHeapFloor(limit)
	a.config.Limits.MaxHeldBytes = heldBytes(a.config.Limits.MaxHeldBytes, limit)
	return nil
}

// warn logs what an operator should know about the configuration.
func (a *App) warn(warnings []string) {
	for _, w := range warnings {
		a.log.Warn("configuration", slog.String("reason", w))
	}
}

// buildRequestPath makes what a request passes through, from the lowest floor up.
func (a *App) buildRequestPath() error {
	var (
		d   *director.Director
		err error
	)
	a.orchestrator, err = sidecar.New(sidecar.Options{
		Config: a.config.Disaggregation, Logger: a.opts.Logger, Registerer: a.registry, Snapshot: a.store.Snapshot,
		Ejected: func(e *pool.Endpoint, reason string) { d.Ejected(e, reason) },
	})
	if err != nil {
		return inFile(a.opts.ConfigFile, err)
	}
	gate, err := admission.New(a.config.Limits.MaxHeldBytes)
	if err != nil {
		return err
	}
	var record func(*director.Record)
	if a.opts.EnableDebug {
		a.decisions = newRing()
		record = a.decisions.put
	}
	var tracer trace.Tracer
	if a.opts.Tracing {
		if a.tracing, err = newTracing(); err != nil {
			return err
		}
		tracer = a.tracing.Tracer("github.com/baton-epp/baton/director")
	}
	d, err = director.New(director.Options{
		Scheduler: func() director.Scheduler { return a.scheduler }, Snapshot: a.store.Snapshot, Orchestrator: a.orchestrator,
		Logger: a.opts.Logger, Registerer: a.registry, AllowUninspectedBodies: a.config.Limits.AllowUninspectedBodies, Record: record,
		MetricsNames: a.opts.MetricsNames, Tracer: tracer,
	})
	if err != nil {
		return err
	}
	a.server, err = extproc.New(extproc.Options{
		Director: d, Gate: gate, MaxBodyBytes: a.config.Limits.MaxBodyBytes, OverrideTimeout: a.overrideTimeout, HoldResponse: a.orchestrator.HoldResponse,
		IgnoreSubset: a.opts.DisableSubsetFilter, Logger: a.opts.Logger, Registerer: a.registry,
	})
	if err != nil {
		return err
	}
	return a.registry.Register(newLoadMetrics(a.store.Snapshot, gate.Held))
}

// overrideTimeout is what a BUFFERED gateway is asked to wait: the budget of the held phase and a second for the answer.
func (a *App) overrideTimeout() time.Duration { return a.orchestrator.Budget() + time.Second }

// buildServers prepares TLS, which is on unless switched off, and the health server.
func (a *App) buildServers() error {
	if n := int64(a.opts.MaxRecvMsgSize); n > 0 && n < a.config.Limits.MaxBodyBytes {
		return fmt.Errorf("--grpc-max-recv-msg-size: %d bytes, must be at least limits.maxBodyBytes (%d): a body above it could not be refused in order", n, a.config.Limits.MaxBodyBytes)
	}
	a.healthServer = grpc.NewServer()
	healthv1.RegisterHealthServer(a.healthServer, a.health)
	if !a.opts.SecureServing {
		return nil
	}
	var err error
	a.cert, err = newCertificate(a.opts.CertPath)
	return err
}

// tlsConfig is the TLS configuration of the ext_proc port.
func (a *App) tlsConfig() (*tls.Config, error) {
	minVersion, err := tlsMinVersion(a.opts.TLSMinVersion)
	if err != nil {
		return nil, err
	}
	suites, err := tlsSuites(a.opts.TLSCipherSuites)
	if err != nil {
		return nil, err
	}
	return a.cert.config(minVersion, suites), nil
}

// newServer makes the gRPC server of one listener.
func (a *App) newServer() *grpc.Server {
	g := grpc.NewServer(a.server.ServerOptions(a.opts.MaxRecvMsgSize, a.opts.MaxSendMsgSize)...)
	a.server.Register(g)
	healthv1.RegisterHealthServer(g, a.health)
	return g
}

// Snapshot is the pool now.
func (a *App) Snapshot() *pool.Snapshot { return a.store.Snapshot() }

// Addr is where ext_proc is answered: the TCP address, or the socket's.
func (a *App) Addr() net.Addr { return a.endpoints[0].listener.Addr() }

// HealthAddr is where the health port listens, nil when there is none.
func (a *App) HealthAddr() net.Addr {
	if a.healthListener == nil {
		return nil
	}
	return a.healthListener.Addr()
}

// MetricsAddr is where metrics are served, nil when there are none.
func (a *App) MetricsAddr() net.Addr {
	if a.metricsListener == nil {
		return nil
	}
	return a.metricsListener.Addr()
}

// joined is errors.Join for errors that are not the ordinary end of a server.
func joined(errs ...error) error {
	var out []error
	for _, err := range errs {
		if err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, grpc.ErrServerStopped) && !errors.Is(err, net.ErrClosed) {
			out = append(out, err)
		}
	}
	return errors.Join(out...)
}

// describe says in one line what was started.
func (a *App) describe() string {
	if a.scheduler.Guards() {
		return "default profile (queue-scorer 2, kv-cache-utilization-scorer 2, prefix-cache-scorer 3); where role labels exist, decode roles only"
	}
	return fmt.Sprintf("%d plugins, %d profiles", len(a.config.Plugins), len(a.config.SchedulingProfiles))
}
