class Winograd:
    @staticmethod
    def load():
        return None
