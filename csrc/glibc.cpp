// What the compiled code would need of a newer glibc and libstdc++ than torch's own wheels need, which run
// from glibc 2.28 and gcc 8's libstdc++ on (manylinux_2_28): the same functions under their older versions. A
// linker takes the newest version that it finds where it runs, so a wheel would else ask for the machine that
// built it.
//
// Red Hat's toolsets, with which PyTorch is built, link such functions from a libstdc++_nonshared.a; this is
// what is used of it here. The names stay within each extension. `auditwheel` tells when one more is needed.

#ifdef __linux__

#include <features.h>

#include <new>

#define HIDDEN extern "C" [[gnu::visibility("hidden")]]

#if defined(__GLIBC__) && defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define OLDEST "GLIBC_2.17"
#endif

#ifdef OLDEST

// The function `name` is the one that glibc has had since it came to this architecture.
#define AS_EVER(result, name, parameters, arguments)   \
  extern "C" result ever_##name parameters;            \
  __asm__(".symver ever_" #name "," #name "@" OLDEST); \
  HIDDEN result own_##name parameters __asm__(#name);  \
  result own_##name parameters {                       \
    return ever_##name arguments;                      \
  }

#if __GLIBC_PREREQ(2, 29)  // these no longer set errno by themselves
AS_EVER(double, exp, (double x), (x))
AS_EVER(double, exp2, (double x), (x))
AS_EVER(double, log, (double x), (x))
AS_EVER(double, log2, (double x), (x))
#endif

#if __GLIBC_PREREQ(2, 34)  // these moved from libdl and libpthread into libc
AS_EVER(void*, dlopen, (const char* file, int mode), (file, mode))
AS_EVER(void*, dlsym, (void* library, const char* name), (library, name))
AS_EVER(int, pthread_once, (int* once, void (*function)()), (once, function))
#endif

#if __GLIBC_PREREQ(2, 32)  // shared_ptr counts without atomics where this is true
HIDDEN char __libc_single_threaded;
char __libc_single_threaded = false;
#endif

#endif  // OLDEST

#if defined(__GLIBCXX__) && _GLIBCXX_RELEASE >= 11

HIDDEN [[noreturn]] void _ZSt28__throw_bad_array_new_lengthv() {
  throw std::bad_array_new_length();
}

// std::exception_ptr's copies and ends were functions of the library; now they are inlined, and call these.
struct ExceptionPointer {
  void* exception;
};
extern "C" void _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(ExceptionPointer* copy,
                                                              const ExceptionPointer*);
extern "C" void _ZNSt15__exception_ptr13exception_ptrD1Ev(ExceptionPointer*);

HIDDEN void _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv(ExceptionPointer* self) {
  ExceptionPointer never_destroyed;
  _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(&never_destroyed, self);
}

HIDDEN void _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv(ExceptionPointer* self) {
  _ZNSt15__exception_ptr13exception_ptrD1Ev(self);
  self->exception = nullptr;
}

#endif

#endif  // __linux__
